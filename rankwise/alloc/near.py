"""Plans under a budget of bytes whose predicted loss is near the least: what is tried where predictions cannot decide.

What is predicted of a plan is as good as what it is made of: pivot layers round less predictably than others, and what
ranks cost is known less well than what rounding costs. So beside the best plan of all choices there are the best of
fewer: without pivot layers, and of one precision with ranks that look at the spectra alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from rankwise.alloc.joint import StoredChoices, Trust, joint_choices, priced
from rankwise.alloc.methods.base import Method, Scores
from rankwise.alloc.precisions import RoundingTable
from rankwise.errors import RankwiseError
from rankwise.plan import RankPlan
from rankwise.storage import Precision

NEAR = 1.3  # predicted losses of plans that are worth a try, over the least one
TOGETHER = "any kind and precision"


def near_plans(
    method: Method,
    store: Scores,
    table: RoundingTable,
    precisions: Sequence[Precision],
    dtype: str,
    within: Callable[[Method, dict[str, StoredChoices]], RankPlan],
    most: int,
) -> dict[str, RankPlan]:
    """The best plan of all choices, and those of fewer whose predicted loss is near, every layer's predicted alike.

    Args:
        method: see `joint_plan`.
        store: spectra.
        table: what rounding adds.
        precisions: to choose from.
        dtype: the model's own.
        within: the best plan of some choices under the budget.
        most: plans at most.

    Returns:
        Plans by what they were chosen from, the least predicted loss first.
    """
    found = {TOGETHER: within(method, joint_choices(method, store, table, precisions, dtype))}
    for name, narrower, fewer, trust in _narrower(method, precisions) if most > 1 else ():
        with suppress(RankwiseError):  # no plan of these is as small
            plan = within(narrower, joint_choices(narrower, store, table, fewer, dtype, trust))
            plan = priced(plan, method, store, table)
            if plan.layers not in [other.layers for other in found.values()]:
                found[name] = plan
    return nearest_of(found, most)


def nearest_of(plans: dict[str, RankPlan], most: int) -> dict[str, RankPlan]:
    """The plan of least predicted loss and, of at most so many, those that are near it; the least first."""
    losses = {name: plan.loss or 0.0 for name, plan in plans.items()}
    ordered = sorted(plans, key=lambda name: losses[name])
    return {name: plans[name] for name in ordered[:most] if losses[name] <= NEAR * losses[ordered[0]]}


def _narrower(
    method: Method, precisions: Sequence[Precision]
) -> Iterator[tuple[str, Method, Sequence[Precision], Trust]]:
    """Fewer choices: without pivot layers, or one precision, its ranks chosen as if nothing were rounded."""
    plain = tuple(kind for kind in method.kinds if kind != "pivot")
    if 0 < len(plain) < len(method.kinds):
        yield "no pivot layers", replace(method, kinds=plain), precisions, Trust()
    for precision in (p for p in precisions if p.quantised and plain):
        yield f"ranks, then {precision}", replace(method, kinds=plain), (precision,), Trust(rounding=0.0)
