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
from rankwise.alloc.store import Metric, factorize_block, metric_of
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
                found, between = refitted.tensors(index), {}
                for name, new in found.items():
                    if outcomes[name].share is not None:
                        weight = weight_of(block[name])
                        old = old_tensors(store, name, plan.layers[name], weight) or {"weight": weight.float()}
                        between[name] = torch.lerp(product(old, device), product(new, device), share)
                metric = metric_of(curvature, index, sides, store.channels)
                found |= _in_form(between, found, plan, metric)
                into.write(index, found, {name: outcomes[name] for name in block})
            advance()
    return into


def _in_form(weights: Tensors, form: dict[str, Tensors], plan: RankPlan, metric: Metric) -> dict[str, Tensors]:
    """Matrices `[m, n]` as what their layers have: a weight, or factors of the plan's rank."""
    made: dict[str, Tensors] = {name: {"weight": weight} for name, weight in weights.items() if "weight" in form[name]}
    factored = {name: weight for name, weight in weights.items() if name not in made}
    tensors = factorize_block(factored, metric) if factored else {}
    for name in factored:
        rank, u, v = plan.layers[name].rank, tensors[f"{name}.u"], tensors[f"{name}.v"]
        made[name] = {"u": u[:, :rank].contiguous(), "v": v[:rank].contiguous()}
    return made
