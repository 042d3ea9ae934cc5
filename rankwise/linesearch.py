"""How far a refit goes: a line search on what the whole compressed model loses on windows that judge."""

import math
from typing import Any

import torch
from torch import nn

from rankwise.alloc.curvature import Curvature
from rankwise.alloc.mlps import swapped
from rankwise.alloc.partway import BETWEEN, part_way
from rankwise.alloc.refit import old_tensors
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.solve import Tensors, product
from rankwise.alloc.store import FactorStore
from rankwise.anatomy import block_linears, weight_of
from rankwise.errors import overflown
from rankwise.evaluate import perplexity
from rankwise.files import read_json, write_json
from rankwise.plan import RankPlan
from rankwise.progress import Track, silent
from rankwise.room import roomy

LOSSES = "shares.json"  # beside the blocks of a refit


@torch.no_grad()
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
        plan: kinds and ranks.
        refitted: the whole refit; parts of it go into folders beside its own.
        curvature: of the dense model.
        judges: `[N, T]` token ids, those that judged each layer of the refit.
        device: where layers are worked out, and where the model runs if it fits twice.
        track: progress.

    Returns:
        Those factors, the old ones if every share of the refit loses more; and share to loss, nats a token, of the
        shares that can be run. Losses are kept beside the refit: a job that is continued decides as before.

    Raises:
        RankwiseError: NaN or Inf, whatever the share.
    """
    tried: dict[float, FactorStore | Refitted] = {1.0: refitted, 0.0: refitted.base}
    for share in BETWEEN:
        place = refitted.folder.with_name(f"{refitted.folder.name}-{share:g}")
        into = Refitted(place, refitted.base, refitted.identity | {"share": share})
        tried[share] = part_way(model, plan, refitted, curvature, share, into, device=device, track=track)
    path = refitted.folder / LOSSES
    if not path.exists():
        found = []
        model.to(roomy(device, model, copies=2))
        with track("how much of the refit", len(tried)) as advance:
            for share in sorted(tried, reverse=True):
                found.append((share, loss_with(model, plan, tried[share], judges)))
                advance()
        model.to("cpu")
        write_json(path, [pair for pair in found if math.isfinite(pair[1])])
    losses: dict[float, float] = dict(read_json(path))
    if not losses:
        raise overflown()
    return tried[min(losses, key=losses.__getitem__)], losses


def loss_with(model: Any, plan: RankPlan, factors: FactorStore | Refitted, judges: torch.Tensor) -> float:
    """Nats a token of a dense model whose linear layers have the factors' products for weights: that needs no pivots.

    Args:
        model: on any device; as it was afterwards.
        plan: kinds and ranks; precisions do not count.
        factors: of the plan, or refitted.
        judges: `[N, T]` token ids.
    """
    linears: dict[str, nn.Module] = {}
    weights: Tensors = {}
    for index, block in enumerate(block_linears(model)):
        linears |= block
        if isinstance(factors, Refitted):
            found = factors.tensors(index)
        else:
            found = {name: old_tensors(factors, name, plan.layers[name], weight_of(m)) for name, m in block.items()}
        for name, parts in found.items():
            if parts:
                own = weight_of(block[name])
                weights[name] = product(parts, own.device).to(own.dtype)
    rows = {name: kept for name in weights if (kept := factors.rows(name)) is not None}
    with swapped(linears, weights, rows):
        return math.log(perplexity(model, judges))
