"""Which windows of which texts one `rankwise compress` uses."""

from typing import Any

import torch

from rankwise.anatomy import require_context
from rankwise.config import CompressConfig
from rankwise.text import read_text, take_windows, token_windows

LEARN_WINDOWS = 256  # of a text that is given to learn from, unless the user says how many
JUDGES = 8  # windows that nothing is fitted to, or as many as the output gradients have if those are fewer
USES = ("inputs", "gradients", "judges", "measure", "learn")


def read_texts(config: CompressConfig, curvature: bool = True) -> dict[str, str]:
    """The texts that a command needs: `calibration` (not for a plan from scores), `learn` where one is given.

    Args:
        config: the command.
        curvature: False where no layer is factored: then text is needed for perplexities alone.

    Raises:
        RankwiseError: an unknown or unreadable text.
    """
    text = config.text
    if not curvature:
        return {"calibration": read_text(text.text)} if text.measure else {}
    needed = {} if config.scores and not config.heal else {"calibration": text.text}
    needed |= {"learn": text.learn} if config.learns and text.learn else {}
    return {key: read_text(source) for key, source in needed.items()}


def cut_windows(config: CompressConfig, raw: dict[str, str], model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Token ids for every use.

    Args:
        config: how many, and how long.
        raw: from `read_texts`.
        model: whose context they must fit into.
        tokenizer: of the model.

    Returns:
        `inputs` and `gradients` for the moments (the longer one begins with the other), `learn` for training, refitting
        and healing, `judges` for what is kept of a refit, a healing, a rounding or several plans, `measure` for
        perplexity: each `[N, T]`, empty where no text is needed. Without a text of its own `learn` is `inputs`; none of
        the windows that judge (`judges`, `measure`) is ever in it.

    Raises:
        RankwiseError: a text is too short, or the windows are longer than the model's context.
    """
    text = config.text
    found = dict.fromkeys(USES, torch.empty(0, text.seq_len, dtype=torch.int64))
    if "calibration" in raw:
        require_context(model, text.seq_len)
        sizes = [max(text.samples, text.gradient_samples), min(JUDGES, text.gradient_samples), text.measure]
        every = token_windows(raw["calibration"], tokenizer, text.seq_len)
        taken = take_windows(every, sum(sizes), text.text, shuffle=text.shuffle, seed=text.seed)
        fit, found["judges"], found["measure"] = taken.split(sizes)
        found |= {"inputs": fit[: text.samples], "gradients": fit[: text.gradient_samples]}
        found["learn"] = found["inputs"]
    if "learn" in raw:
        every = token_windows(raw["learn"], tokenizer, text.seq_len)
        fresh = _without(every, torch.cat([found["judges"], found["measure"]]))
        count = text.learn_samples or min(LEARN_WINDOWS, max(1, len(fresh)))
        found["learn"] = take_windows(fresh, count, str(text.learn))
    return found


def _without(windows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Those windows that are not among the others."""
    known = {tuple(window) for window in others.tolist()}
    return windows[[tuple(window) not in known for window in windows.tolist()]]
