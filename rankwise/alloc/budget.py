"""Exact budgets: what a layer may become, what that costs, and filling a budget to the last step."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rankwise.errors import RankwiseError
from rankwise.plan import layer_parameters

STEPS = 200  # halvings of the multiplier's range; far beyond what fp64 can tell apart
NEARBY = 6  # choices above and below a layer's own that `tighten` tries


@dataclass(frozen=True)
class Choices:
    """Everything that one layer may become, in rising order of parameters.

    Args:
        kind: kind of each choice.
        rank: `[c]` ranks.
        cost: `[c]` parameters.
        loss: `[c]` predicted loss of each choice.
        dense_cost: parameters of the layer as it was.
    """

    kind: tuple[str, ...]
    rank: np.ndarray
    cost: np.ndarray
    loss: np.ndarray
    dense_cost: int


def layer_choices(
    out_features: int, in_features: int, energy: np.ndarray, kinds: tuple[str, ...], multiple: int
) -> Choices:
    """List a layer's choices: none larger than dense, none dearer than another of the same or a higher rank.

    Args:
        energy: `[r]` worth of each component, finite; the loss of rank k is the sum of what lies behind k.
        kinds: allowed kinds.
        multiple: ranks of factored kinds are multiples of it.
    """
    full = min(out_features, in_features)
    tail = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
    dense = layer_parameters("dense", full, out_features, in_features)
    rows: list[tuple[int, int, str]] = []
    for kind in kinds:
        ranks = [full] if kind == "dense" else range(multiple, full, multiple)
        costs = [(layer_parameters(kind, rank, out_features, in_features), rank) for rank in ranks]
        rows += [(cost, rank, kind) for cost, rank in costs if cost < dense or kind == "dense"]
    best: list[tuple[int, int, str]] = []
    for row in sorted(rows, key=lambda row: (row[0], -row[1])):
        if not best or row[1] > best[-1][1]:
            best.append(row)
    return Choices(
        tuple(kind for _, _, kind in best),
        np.array([rank for _, rank, _ in best], dtype=np.int64),
        np.array([cost for cost, _, _ in best], dtype=np.int64),
        np.array([0.0 if kind == "dense" else tail[rank] for _, rank, kind in best]),
        dense,
    )


def require_choices(choices: dict[str, Choices], multiple: int) -> None:
    """Raise a RankwiseError if some layer may become nothing at all."""
    for name, entry in choices.items():
        if not entry.kind:
            allowed = "smaller (groups of 4-bit weights raise it), or allow the kind dense"
            raise RankwiseError("rank_multiple", multiple, f"too large for {name}; {allowed}")


def require_reachable(choices: dict[str, Choices], target: float, total: int, narrower: float = 1.0) -> None:
    """Raise a RankwiseError if even the smallest (largest) choices miss `target` parameters.

    Args:
        choices: of every layer.
        target: parameters.
        total: of the dense model.
        narrower: share of the smallest choices that may be left when layers have lost channels.
    """
    lowest = narrower * sum(int(entry.cost[0]) for entry in choices.values())
    highest = sum(int(entry.cost[-1]) for entry in choices.values())
    if not lowest <= target <= highest:
        found = f"{target / total:.4g}"
        allowed = f"these kinds and this rank multiple reach {lowest / total:.4g} to {highest / total:.4g}"
        raise RankwiseError("ratio", found, allowed)


def multiplier(cost: Callable[[float], int], target: float) -> tuple[float, float]:
    """The Lagrange multipliers next to a budget: at the first more is spent than it, at the second it is met.

    Args:
        cost: what is spent where a unit of cost is worth so much loss; falls.
        target: the budget.
    """
    low, high = -80.0, 80.0  # log λ: all that may be dense, all as small as may be
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(float(np.exp(middle))) <= target else (middle, high)
    return float(np.exp(low)), float(np.exp(high))


def cost_of(choices: dict[str, Choices], picked: dict[str, int]) -> int:
    """Parameters of a selection."""
    return sum(int(choices[name].cost[i]) for name, i in picked.items())


def fill(choices: dict[str, Choices], picked: dict[str, int], target: float) -> dict[str, int]:
    """Spend what is left below `target` parameters on the steps that save the most loss per parameter.

    Args:
        picked: layer to the index of its choice; its total cost is at most `target`.

    Returns:
        A new selection, no step of which could be followed by another that fits.
    """
    picked = dict(picked)
    left = target - cost_of(choices, picked)
    heap = [step for name, at in picked.items() if (step := _best_step(choices[name], at, left, name))]
    heapq.heapify(heap)
    while heap:
        _, _, name, to = heapq.heappop(heap)
        entry = choices[name]
        needed = int(entry.cost[to] - entry.cost[picked[name]])
        if needed <= left:
            left -= needed
            picked[name] = to
        if again := _best_step(entry, picked[name], left, name):
            heapq.heappush(heap, again)
    return picked


def tighten(choices: dict[str, Choices], picked: dict[str, int], target: float, tolerance: float) -> dict[str, int]:
    """Where steps are coarse, change one or two layers a little so that less than `tolerance` is left over.

    Of all moves of at most two layers that end within the tolerance, the one of least loss is made; a selection that
    is within already, or that no such move mends, is returned as it is.
    """
    left = target - cost_of(choices, picked)
    if left <= tolerance * target:
        return picked
    names, to, cost, loss = _moves(choices, picked)
    total = cost[:, None] + cost[None, :]
    allowed = (total <= left) & (total >= left - tolerance * target) & (names[:, None] != names[None, :])
    if not allowed.any():
        return picked
    first, second = np.unravel_index(np.argmin(np.where(allowed, loss[:, None] + loss[None, :], np.inf)), total.shape)
    order = list(picked)
    moves = {order[names[i]]: int(to[i]) for i in (int(first), int(second)) if names[i] >= 0}
    return picked | moves


def _moves(choices: dict[str, Choices], picked: dict[str, int]) -> tuple[np.ndarray, ...]:
    """Every layer's nearby choices: layer number, choice, extra cost, extra loss; entry 0 moves nothing."""
    rows = [(-1, -1, 0.0, 0.0)]
    for number, (name, at) in enumerate(picked.items()):
        entry = choices[name]
        for to in range(max(0, at - NEARBY), min(len(entry.cost), at + NEARBY + 1)):
            if to != at:
                rows.append(
                    (number, to, float(entry.cost[to] - entry.cost[at]), float(entry.loss[to] - entry.loss[at]))
                )
    return tuple(np.array(column) for column in zip(*rows, strict=True))


def require_exact(
    choices: dict[str, Choices], picked: dict[str, int], target: float, total: int, tolerance: float
) -> None:
    """Raise a RankwiseError if the selection misses the target by more than `tolerance`, relative."""
    used = cost_of(choices, picked)
    if abs(used - target) > tolerance * target:
        raise RankwiseError(
            "ratio",
            f"{target / total:.4g}",
            f"the nearest below that this rank multiple reaches is {used / total:.4g}; "
            "use a smaller --rank-multiple or a larger --tolerance",
        )


def _best_step(entry: Choices, at: int, left: float, name: str) -> tuple[float, int, str, int] | None:
    """The affordable step up with the best gain per parameter, as a heap entry (best first)."""
    extra = entry.cost[at + 1 :] - entry.cost[at]
    usable = (extra > 0) & (extra <= left)
    if not usable.any():
        return None
    gain = entry.loss[at] - entry.loss[at + 1 :]
    rate = np.where(usable, gain / np.maximum(extra, 1), -np.inf)
    best = int(np.argmax(rate))
    return -float(rate[best]), int(extra[best]), name, at + 1 + best
