"""No time is reported of numbers that are wrong: what a contestant computes must not depend on its KV cache."""

from collections.abc import Callable

import numpy as np

from rankwise.errors import RankwiseError

ERROR = 0.05  # largest relative difference that passes
LENGTH, STEPS = 12, 4  # at most: of the prompt, and tokens decoded from its cache
Top = Callable[[list[int], int], tuple[list[int], dict[int, float]]]


def require_cache(name: str, top: Top, vocabulary: int, longest: int) -> None:
    """Compare the likeliest tokens after a few decoded ones with those after the same tokens as a prompt.

    Args:
        name: for the message.
        top: of a prompt and a number of tokens, the greedy output and the log-probabilities of the likeliest tokens at
            its last place.
        vocabulary: ids are below it.
        longest: tokens that a sequence may have.

    Raises:
        RankwiseError: they differ.
    """
    steps = min(STEPS, longest - 1)
    prompt = np.random.default_rng(0).integers(vocabulary, size=min(LENGTH, longest - steps)).tolist()
    tokens, cached = top(prompt, steps)
    _, full = top(prompt + tokens[:-1], 1)
    both = sorted(cached.keys() & full.keys())
    if 2 * len(both) < len(full):
        raise RankwiseError("model", f"{name}: with and without KV cache other tokens are likely", "no timing")
    require_close(name, np.array([cached[t] for t in both]), np.array([full[t] for t in both]))


def require_close(name: str, cached: np.ndarray, full: np.ndarray) -> None:
    """Raise a RankwiseError unless values with a cache are those without, within `ERROR`; NaN never passes."""
    error = float(np.linalg.norm(cached - full) / np.linalg.norm(full))
    if not error < ERROR:
        raise RankwiseError("model", f"{name}: logits with and without KV cache differ by {error:.2g}", "no timing")
