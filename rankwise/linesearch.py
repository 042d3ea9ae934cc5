"""How far a refit goes: a line search on what the whole compressed model loses on windows that judge."""

import math
from typing import Any

import torch

from rankwise.alloc.curvature import Curvature
from rankwise.alloc.partway import BETWEEN, part_way
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore
from rankwise.candidates import Candidate, loss_of
from rankwise.plan import RankPlan
from rankwise.progress import Track, silent
from rankwise.quantize import nearest
from rankwise.storage import Precision
from rankwise.zoo import model_dtype


def search_share(
    model: Any,
    plan: RankPlan,
    refitted: Refitted,
    curvature: Curvature,
    judges: torch.Tensor,
    *,
    device: torch.device,
    track: Track = silent,
) -> tuple[FactorStore | Refitted, dict[float, float]]:
    """The factors of least held-out loss between those before a refit and those after it.

    Args:
        model: dense, in host memory; as it was afterwards.
        plan: kinds and ranks; what it rounds is judged before rounding.
        refitted: the whole refit; parts of it go into folders beside its own.
        curvature: of the dense model.
        judges: `[N, T]` token ids that nothing was fitted to.
        device: where layers are worked out, and where the compressed models run if they fit.
        track: progress.

    Returns:
        Those factors, the old ones if every share of the refit loses more; and share to loss, nats a token.
    """
    tried: dict[float, FactorStore | Refitted] = {1.0: refitted, 0.0: refitted.base}
    for share in BETWEEN:
        place = refitted.folder.with_name(f"{refitted.folder.name}-{share:g}")
        into = Refitted(place, refitted.base, refitted.identity | {"share": share})
        tried[share] = part_way(model, plan, refitted, curvature, share, into, device=device, track=track)
    whole = plan.stored_as(Precision(model_dtype(model)))
    losses = {}
    for share in sorted(tried, reverse=True):
        losses[share] = loss_of(Candidate(whole, tried[share], nearest), model, judges, device, track)
    best = min(losses, key=lambda share: losses[share] if math.isfinite(losses[share]) else math.inf)
    return tried[best], losses
