"""Plans under a byte budget, carried out one after another and judged on text: what is predicted decides only so much.

Predicted losses of the best plans lie closer together than the predictions are good. So a few of them are carried out,
rounding included, and the one with the least loss on windows that the input moments have not seen is taken.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
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


def choose(
    plans: dict[str, RankPlan],
    model: Any,
    store: FactorStore,
    rounding: Rounding,
    judges: torch.Tensor,
    device: torch.device,
    track: Track,
) -> RankPlan:
    """The plan of least loss on some windows; the first one where none is clearly better, or there are no windows.

    Args:
        plans: by what they were chosen from, from `rounded.byte_plans`, the least predicted loss first.
        model: dense; as it was afterwards.
        store: its factors.
        rounding: as the job rounds; what it keeps on disk is found again when the chosen plan is carried out for good.
        judges: `[N, T]` token ids.
        device: where the compressed models run, if they fit.
        track: progress.

    Returns:
        The plan, all of them named in `provenance["candidates"]` with predicted and measured loss, nats a token.
    """
    losses: dict[str, float] = {}
    if len(plans) > 1 and len(judges):
        for name, plan in plans.items():
            with carried_out(plan, model, store, rounding, track):
                losses[name] = math.log(perplexity(model.to(roomy(device, model)), judges, track=track))
                model.to("cpu")
    first = next(iter(plans))
    best = min(plans, key=lambda name: losses.get(name, math.inf))
    if losses and losses[first] - losses[best] < MARGIN:
        best = first
    tried = [{"of": name, "predicted": plans[name].loss, "measured": losses.get(name)} for name in plans]
    plans[best].provenance["candidates"] = tried
    return plans[best]


@contextmanager
def carried_out(plan: RankPlan, model: Any, store: FactorStore, rounding: Rounding, track: Track) -> Iterator[None]:
    """The model as a plan makes it; afterwards its own layers are back. Both are in memory meanwhile."""
    own = {name: model.get_submodule(name) for name in plan.compressed}
    try:
        compress(model, plan, store, rounding=rounding, track=track)
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)
        detach(model)
