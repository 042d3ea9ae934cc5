"""Requests as they arrive: a seeded Poisson process over a mix of lengths."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.bench.config import Load
from rankwise.errors import RankwiseError


@dataclass(frozen=True)
class Request:
    """One request of a trace.

    Args:
        arrival: seconds after the trace's start.
        prompt: ids.
        output: tokens that it asks for.
    """

    arrival: float
    prompt: list[int]
    output: int


def make_trace(load: Load, vocabulary: int, round_: int) -> list[Request]:
    """The requests of a round, in order; the first one arrives at 0.

    Args:
        load: rate, number and mix.
        vocabulary: ids are drawn below it.
        round_: which; each has its own arrivals, the same for all contestants.
    """
    random = np.random.default_rng([load.seed, round_ + 1])
    arrivals = np.cumsum(random.exponential(1 / load.rate, load.requests))
    kinds = random.integers(len(load.mix), size=load.requests)
    trace = []
    for arrival, kind in zip(arrivals - arrivals[0], kinds, strict=True):
        prompt, output = load.mix[kind]
        trace.append(Request(float(arrival), _ids(random, prompt, vocabulary), output))
    return trace


def make_prompts(batch: int, length: int, vocabulary: int, round_: int) -> list[list[int]]:
    """Random prompts of one length, others in every round."""
    random = np.random.default_rng([batch, length, round_ + 1])
    return [_ids(random, length, vocabulary) for _ in range(batch)]


def cut_prompts(ids: Sequence[int], batch: int, length: int, round_: int) -> list[list[int]]:
    """Pieces of a text, one after another; a round goes on where the last one ended, and from the start after the end.

    Args:
        ids: of the text.
        batch: how many.
        length: tokens of each.
        round_: which, from -1.

    Raises:
        RankwiseError: the text is too short for pieces that differ.
    """
    if len(ids) < batch * length:
        raise RankwiseError("text", f"{len(ids)} tokens", f"{batch} prompts of {length} need {batch * length}")
    starts = [((round_ + 1) * batch + at) * length % (len(ids) - length + 1) for at in range(batch)]
    return [list(ids[start : start + length]) for start in starts]


def _ids(random: np.random.Generator, length: int, vocabulary: int) -> list[int]:
    return [int(token) for token in random.integers(vocabulary, size=length)]
