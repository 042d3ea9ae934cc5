"""Plans under a byte budget, carried out one after another and judged on text: what is predicted decides only so much.

Predicted losses of the best plans lie closer together than the predictions are good. So a few of them are carried out,
rounding included, and the one with the least loss on windows that the input moments have not seen is taken.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.store import FactorStore
from rankwise.engine.doors.hf import detach
from rankwise.errors import overflown
from rankwise.evaluate import perplexity
from rankwise.files import digest, read_json, write_json
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
    kept: Path,
    device: torch.device,
    track: Track,
) -> Candidate:
    """The one of least loss on some windows; the first one where none is clearly better, or there are no windows.

    Args:
        candidates: by what they were chosen from, the least predicted loss first.
        model: dense; as it was afterwards.
        judges: `[N, T]` token ids.
        kept: the file of losses: a job that is continued goes by those that it has.
        device: where the compressed models run, if they fit.
        track: progress.

    Returns:
        That one; its plan's `provenance["candidates"]` names all with predicted and measured loss, nats a token.

    Raises:
        RankwiseError: NaN or Inf, whatever the plan.
    """
    losses: dict[str, float] = {}
    if len(candidates) > 1 and len(judges):
        losses = _losses(candidates, model, judges, kept, device, track)
        if not any(map(math.isfinite, losses.values())):
            raise overflown()
    first = next(iter(candidates))
    best = min(candidates, key=lambda name: losses.get(name, math.inf))
    if losses and losses[first] - losses[best] < MARGIN:
        best = first
    tried = [{"of": n, "predicted": c.plan.loss, "measured": losses.get(n)} for n, c in candidates.items()]
    candidates[best].plan.provenance["candidates"] = tried
    return candidates[best]


def _losses(
    candidates: dict[str, Candidate], model: Any, judges: torch.Tensor, kept: Path, device: torch.device, track: Track
) -> dict[str, float]:
    """Candidate to loss, infinite where there is none; measured, or found in the file, by what the layers become."""
    known: dict[str, float | None] = dict(read_json(kept)) if kept.exists() else {}
    keys = {name: digest(candidate.plan.to_dict()["layers"], 16) for name, candidate in candidates.items()}
    for name, candidate in candidates.items():
        if keys[name] not in known:
            with carried_out(candidate, model, device, track):
                known[keys[name]] = math.log(perplexity(model.to(roomy(device, model)), judges, track=track))
                model.to("cpu")
            write_json(kept, known)
    found = {name: known[key] for name, key in keys.items()}
    return {name: loss if loss is not None and math.isfinite(loss) else math.inf for name, loss in found.items()}


@contextmanager
def carried_out(candidate: Candidate, model: Any, device: torch.device, track: Track) -> Iterator[None]:
    """The model as a plan makes it; afterwards its own layers are back. Both are in memory meanwhile."""
    own = {name: model.get_submodule(name) for name in candidate.plan.compressed}
    try:
        compress(model, candidate.plan, candidate.store, rounding=candidate.rounding, device=device, track=track)
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)
        detach(model)
