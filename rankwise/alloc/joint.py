"""Kind, rank and precision of every layer under one budget of bytes.

Every layer may become any kind, at any rank, in any of some precisions. The cost of a choice is its bytes, scales,
zero points and indices included; its loss is what the rank drops, by the spectrum, plus what rounding adds
(`precisions.py`), each times how far such predictions fell short of measured loss. One Lagrange multiplier over all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from rankwise.alloc.budget import Choices, cost_of, tighten
from rankwise.alloc.methods.base import Method, Scores
from rankwise.alloc.methods.lagrange import Global
from rankwise.alloc.precisions import RoundingTable
from rankwise.errors import RankwiseError
from rankwise.plan import LayerSpec, RankPlan
from rankwise.storage import Precision


@dataclass(frozen=True)
class Trust:
    """Measured loss over predicted loss, for each of its parts.

    Spectra are those of the calibration text: what they say a dropped component is worth is less than it is worth on
    other text. Rounding errors are not fitted to a text, and their estimate is nearer to the truth.

    Args:
        rank: factor on what dropped components are worth.
        rounding: factor on what rounding is expected to add.
    """

    rank: float = 3.0
    rounding: float = 1.25


@dataclass(frozen=True)
class StoredChoices(Choices):
    """Choices whose cost is bytes.

    Args:
        precision: of each choice.
    """

    precision: tuple[Precision, ...] = ()


def joint_plan(
    method: Method,
    scores: Scores,
    table: RoundingTable,
    precisions: Sequence[Precision],
    budget: int,
    dtype: str,
    trust: Trust | None = None,
) -> RankPlan:
    """The plan of least predicted loss whose layers take at most `budget` bytes.

    Args:
        method: for its kinds, rank multiple, tolerance and pinned layers; its ratio is not looked at.
        scores: shapes and two-sided spectra, in model order.
        table: what rounding adds.
        precisions: to choose from.
        budget: bytes of all linear layers.
        dtype: the model's own, in which pinned layers stay.
        trust: see there.

    Returns:
        A plan that is never above the budget, and below it by at most `method.tolerance`, relative, unless the best
        plan of all takes less.

    Raises:
        RankwiseError: the budget is below the smallest plan (the message says how large that is), or one-sided spectra.
    """
    choices = joint_choices(method, scores, table, precisions, dtype, trust)
    return plan_within(method, scores, choices, budget)


def joint_choices(
    method: Method,
    scores: Scores,
    table: RoundingTable,
    precisions: Sequence[Precision],
    dtype: str,
    trust: Trust | None = None,
) -> dict[str, StoredChoices]:
    """What every layer may become, whatever the budget; arguments and errors are those of `joint_plan`."""
    if not method.two_sided:
        raise RankwiseError("sides", method.sides, "allowed with a budget of bytes: two (losses in nats are needed)")
    smallest_plan(method, scores.shapes, precisions, dtype)  # every layer may become something
    trust = trust or Trust()
    return {
        name: stored_choices(method, name, scores, table, allowed(method, name, precisions, dtype), trust)
        for name in scores.shapes
    }


def plan_within(method: Method, scores: Scores, choices: dict[str, StoredChoices], budget: int) -> RankPlan:
    """The plan of least loss among these choices whose layers take at most `budget` bytes; see `joint_plan`."""
    lowest = sum(int(entry.cost[0]) for entry in choices.values())
    _require_at_least(lowest, budget, scores.originals)
    highest = sum(int(entry.cost[-1]) for entry in choices.values())
    if budget >= highest:
        picked = {name: len(entry.kind) - 1 for name, entry in choices.items()}
    else:
        picked = Global()._pick(dict(choices), scores, budget)
        picked = tighten(dict(choices), picked, budget, method.tolerance)
    assert cost_of(dict(choices), picked) <= budget
    return RankPlan({name: _spec(method, name, choices[name], at, scores) for name, at in picked.items()})


def require_bytes(
    method: Method, shapes: dict[str, tuple[int, int]], precisions: Sequence[Precision], budget: int, dtype: str
) -> None:
    """Raise a RankwiseError if no plan is as small as `budget` bytes; arguments are those of `joint_plan`."""
    _require_at_least(smallest_plan(method, shapes, precisions, dtype).bytes, budget, shapes)


def smallest_plan(
    method: Method, shapes: dict[str, tuple[int, int]], precisions: Sequence[Precision], dtype: str
) -> RankPlan:
    """The plan of fewest bytes, of all widths; arguments are those of `joint_plan`.

    Raises:
        RankwiseError: some layer may become nothing at all.
    """
    layers = {}
    for name, (m, n) in shapes.items():
        found = []
        for kind, precision in allowed(method, name, precisions, dtype):
            ranks, costs = _costs(m, n, kind, precision, method.rank_multiple)
            found += [(int(cost), kind, int(k), precision) for cost, k in zip(costs[:1], ranks[:1], strict=True)]
        if not found:
            raise _nothing(name, n, precisions)
        _, kind, rank, precision = min(found, key=lambda entry: entry[0])
        layers[name] = LayerSpec(kind, m, n, rank).stored_as(precision)
    return RankPlan(layers)


def _nothing(name: str, columns: int, precisions: Sequence[Precision]) -> RankwiseError:
    """Why a layer of so many columns may become nothing: its group, where no precision's fits, or its kinds."""
    if all(columns % precision.block for precision in precisions):
        try:
            precisions[0].require_blocks(f"in_features of {name},", columns)
        except RankwiseError as error:
            return error
    return RankwiseError("weights", f"nothing that {name} can be", "more precisions, or the kind dense, are needed")


def _require_at_least(lowest: int, budget: int, shapes: dict[str, tuple[int, int]]) -> None:
    if budget < lowest:
        total = sum(m * n for m, n in shapes.values())
        found = f"{budget} bytes for the linear layers, {8 * budget / total:.3g} bits for each of their numbers"
        raise RankwiseError("budget", found, f"the smallest possible: {lowest} bytes, {8 * lowest / total:.3g} bits")


def stored_choices(
    method: Method,
    name: str,
    scores: Scores,
    table: RoundingTable,
    options: Sequence[tuple[str, Precision]],
    trust: Trust,
) -> StoredChoices:
    """What a layer may become, maybe nothing, by rising bytes; a choice that another beats in both is left out.

    Args:
        options: kinds and precisions.
    """
    (m, n), tail = scores.shapes[name], _tail(method, name, scores)
    rows: list[tuple[int, float, str, int, Precision]] = []
    for kind, precision in options:
        ranks, costs = _costs(m, n, kind, precision, method.rank_multiple)
        if len(ranks):
            losses = _losses(tail, name, table, kind, ranks, precision, trust)
            rows += [(int(c), float(x), kind, int(k), precision) for c, x, k in zip(costs, losses, ranks, strict=True)]
    best: list[tuple[int, float, str, int, Precision]] = []
    for row in sorted(rows, key=lambda row: row[:2]):
        if not best or row[1] < best[-1][1]:
            best.append(row)
    cost, loss, kinds, ranks_, stored = zip(*best, strict=True) if best else ((), (), (), (), ())
    return StoredChoices(tuple(kinds), np.array(ranks_), np.array(cost), np.array(loss), m * n, tuple(stored))


def priced(
    plan: RankPlan, method: Method, scores: Scores, table: RoundingTable, trust: Trust | None = None
) -> RankPlan:
    """The same plan with the loss that `joint_plan` would predict for each layer, however it was made."""
    layers, trust = {}, trust or Trust()
    for name, spec in plan:
        tail = _tail(method, name, scores)
        loss = _losses(tail, name, table, spec.kind, np.array([spec.rank]), spec.precision, trust)
        layers[name] = replace(spec, loss=float(loss[0]) + _gone(name, scores, trust))
    return replace(plan, layers=layers)


def _tail(method: Method, name: str, scores: Scores) -> np.ndarray:
    """What a layer's components from each rank on are worth, nats a token, `[full rank + 1]`."""
    return np.concatenate([np.cumsum(method._worth(scores.energies[name])[::-1])[::-1], [0.0]]) / 2


def _gone(name: str, scores: Scores, trust: Trust) -> float:
    """Predicted loss of the channels that a layer no longer reads, nats a token."""
    return trust.rank * scores.removed.get(name, 0.0)


def _losses(
    tail: np.ndarray,
    name: str,
    table: RoundingTable,
    kind: str,
    ranks: np.ndarray,
    precision: Precision,
    trust: Trust,
) -> np.ndarray:
    """Predicted loss of a layer at some ranks `[c]`, nats a token."""
    lost = 0.0 if kind == "dense" else trust.rank * tail[ranks]
    return np.asarray(lost + trust.rounding * table.loss(name, kind, ranks, precision))


def allowed(method: Method, name: str, precisions: Sequence[Precision], dtype: str) -> list[tuple[str, Precision]]:
    """Kinds and precisions that a layer may have."""
    if method.pins(name):
        return [("dense", Precision(dtype))]
    return [(kind, precision) for kind in method.kinds for precision in precisions]


@lru_cache(maxsize=1024)
def _costs(m: int, n: int, kind: str, precision: Precision, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks that a kind may have in a precision, and the bytes of each; nothing that needs more than dense."""
    full = min(m, n)
    step = int(np.lcm(multiple, precision.block))
    found = []
    if n % precision.block == 0:
        for rank in [full] if kind == "dense" else range(step, full, step):
            try:
                found.append((rank, LayerSpec(kind, m, n, rank).stored_as(precision).bytes))
            except RankwiseError:  # more parameters than dense
                break
    return np.array([rank for rank, _ in found], dtype=np.int64), np.array([cost for _, cost in found], dtype=np.int64)


def _spec(method: Method, name: str, entry: StoredChoices, at: int, scores: Scores) -> LayerSpec:
    spec = method.spec(name, entry.kind[at], int(entry.rank[at]), scores, "bf16")
    return replace(spec.stored_as(entry.precision[at]), loss=float(entry.loss[at]) + _gone(name, scores, Trust()))
