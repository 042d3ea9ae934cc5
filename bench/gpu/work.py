"""What one line of the GPU suite measures: our call, its peers, the exact answer, and the least that must be moved."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contest:
    """Calls on one set of random inputs.

    Args:
        ours: returns a tensor, or a tuple of tensors.
        peers: name (with its version where it is a library) to a call for comparison, of the same work unless its name
            says otherwise.
        reference: the answer in fp64, as `ours` returns it; not timed.
        tolerance: of ‖y - reference‖ / ‖reference‖, for ours.
        clock: seconds of `ours` and of every peer by name, each as often as it was measured; and peers that would not
            run, with the reason. None: calls are timed.
    """

    ours: Call
    peers: dict[str, Call]
    reference: Call
    tolerance: float
    clock: Callable[[], tuple[dict[str, list[float]], dict[str, str]]] | None = None


@dataclass(frozen=True)
class Goal:
    """What a line is to reach.

    Args:
        figure: `microseconds`, `seconds`, `error`, `bandwidth` (share of the measured ceiling), `speedup` over `peer`,
            `memory`: what a call takes beside its inputs, as a multiple of what `peer` takes, or `rate`: tokens a
            second.
        at: the bound: at least for speedup, bandwidth and rate, at most for the others.
        peer: how its name begins, for `speedup` and `memory`.
    """

    figure: str
    at: float
    peer: str = ""


@dataclass(frozen=True)
class Work:
    """One line of the suite.

    Args:
        id: of the goal, e.g. `K1`.
        name: shape, rank, dtype, tokens.
        build: a contest on fresh random inputs on a device. It is called several times, so that the sets of inputs
            taken in turn outgrow the L2 cache.
        bytes: the least traffic of `ours`: each input read once, each output written once.
        flops: multiply-adds count two.
        goals: may be none.
        cold: rotate over many sets of inputs; False for work that takes milliseconds.
        graph: capture in a CUDA graph; False where the work synchronises.
        once: every call is made once, and that is its time; for what takes many seconds.
        tokens: that a call makes, where a rate is of interest.
    """

    id: str
    name: str
    build: Callable[[torch.device], Contest]
    bytes: int
    flops: int = 0
    goals: tuple[Goal, ...] = field(default=())
    cold: bool = True
    graph: bool = True
    once: bool = False
    tokens: int = 0


def built(make: Callable[[], Call]) -> Call:
    """A peer's call; where it cannot be made, one that raises the reason: so this peer alone is not measured."""
    try:
        return make()
    except Exception as problem:
        return partial(_refuse, problem.with_traceback(None))  # whose frames hold tensors


def _refuse(problem: Exception) -> None:
    raise problem


def reason(problem: Exception) -> str:
    """An error in one line of a result file."""
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
