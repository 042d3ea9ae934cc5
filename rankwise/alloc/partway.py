"""A refit gone part of the way: every layer between its old matrix and the refitted one, of the same rank.

The refit takes its layers one at a time, each as if what it leaves behind met no other layer's remainder. Together
their steps overshoot: on other text part of the way is better than all of it (`rankwise.linesearch` looks how far).
"""

from typing import Any

import torch

from rankwise.alloc.curvature import Curvature
from rankwise.alloc.refit import old_tensors
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.solve import Tensors, product
from rankwise.alloc.store import Metric, metric_of
from rankwise.anatomy import block_linears, weight_of
from rankwise.plan import RankPlan
from rankwise.progress import Track, silent

BETWEEN = (0.75, 0.5)  # shares of the way that are tried beside all of it and none


@torch.no_grad()
def part_way(
    model: Any,
    plan: RankPlan,
    refitted: Refitted,
    curvature: Curvature,
    share: float,
    into: Refitted,
    *,
    device: torch.device,
    track: Track = silent,
) -> Refitted:
    """`W₀ + share (W₁ - W₀)` of every layer that was refitted, or finish what `into` holds of it.

    What is factored is truncated to its rank once more, in the metric of the loss on the inputs of the dense model.

    Args:
        model: the dense model, in host memory; it is left as it was.
        plan: kinds and ranks.
        refitted: W₁ `[m, n]` of every layer; its base has W₀.
        curvature: of the dense model.
        share: in (0, 1).
        into: where the factors go, one block a file, with the outcomes of the whole refit.
        device: where blocks compute.
        track: progress.
    """
    store, outcomes, linears = refitted.base, refitted.outcomes(), block_linears(model)
    sides = "two" if curvature.has_outputs else "one"
    with track("part of the refit", len(linears)) as advance:
        for index, block in enumerate(linears):
            if not into.file(index).exists():
                metric = metric_of(curvature, index, sides, store.channels)
                found = refitted.tensors(index)
                for name in [name for name in found if outcomes[name].share is not None]:
                    weight = weight_of(block[name])
                    old = old_tensors(store, name, plan.layers[name], weight)
                    before = (product(old) if old else weight).to(device).float()
                    between = torch.lerp(before, product(found[name]).to(device), share)
                    found[name] = _of_rank(name, between, plan.layers[name].rank, found[name], metric)
                into.write(index, found, {name: outcomes[name] for name in block})
            advance()
    return into


def _of_rank(name: str, weight: torch.Tensor, rank: int, form: Tensors, metric: Metric) -> Tensors:
    """A matrix `[m, n]` in the form that a layer has."""
    if "weight" in form:
        return {"weight": weight}
    made = metric({name: weight})[name]
    return {"u": made.u[:, :rank].contiguous(), "v": made.v[:rank].contiguous()}
