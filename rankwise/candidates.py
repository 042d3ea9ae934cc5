"""Plans under a byte budget, carried out one after another and judged on text: what is predicted decides only so much.

Predicted losses of the best plans lie closer together than the predictions are good. So a few of them are carried out,
rounding included, and the one with the least loss on windows that the input moments have not seen is taken.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rankwise.alloc.store import FactorStore
from rankwise.engine.doors.hf import detach
from rankwise.evaluate import perplexity
from rankwise.pipeline import Rounding, compress
from rankwise.plan import RankPlan
from rankwise.progress import Track
from rankwise.room import roomy

MARGIN = 2e-3  # nats a token: what so few windows cannot tell apart; the prediction decides then


@dataclass(frozen=True)
class Candidate:
    """A plan, and how it is carried out.

    Args:
        plan: kinds, ranks and precisions.
        store: the factors that it was made from.
        rounding: as the job rounds; what it keeps on disk is found again when the plan is carried out for good.
    """

    plan: RankPlan
    store: FactorStore
    rounding: Rounding


def choose(
    candidates: dict[str, Candidate],
    model: Any,
    judges: torch.Tensor,
    device: torch.device,
    track: Track,
) -> Candidate:
    """The one of least loss on some windows; the first one where none is clearly better, or there are no windows.

    Args:
        candidates: by what they were chosen from, the least predicted loss first.
        model: dense; as it was afterwards.
        judges: `[N, T]` token ids.
        device: where the compressed models run, if they fit.
        track: progress.

    Returns:
        That one; its plan's `provenance["candidates"]` names all with predicted and measured loss, nats a token.
    """
    losses: dict[str, float] = {}
    if len(candidates) > 1 and len(judges):
        for name, candidate in candidates.items():
            with carried_out(candidate, model, track):
                losses[name] = math.log(perplexity(model.to(roomy(device, model)), judges, track=track))
                model.to("cpu")
    first = next(iter(candidates))
    best = min(candidates, key=lambda name: losses.get(name, math.inf))
    if losses and losses[first] - losses[best] < MARGIN:
        best = first
    tried = [{"of": n, "predicted": c.plan.loss, "measured": losses.get(n)} for n, c in candidates.items()]
    candidates[best].plan.provenance["candidates"] = tried
    return candidates[best]


@contextmanager
def carried_out(candidate: Candidate, model: Any, track: Track) -> Iterator[None]:
    """The model as a plan makes it; afterwards its own layers are back. Both are in memory meanwhile."""
    own = {name: model.get_submodule(name) for name in candidate.plan.compressed}
    try:
        compress(model, candidate.plan, candidate.store, rounding=candidate.rounding, track=track)
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)
        detach(model)
