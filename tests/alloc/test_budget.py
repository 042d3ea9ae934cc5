"""Budgets against exhaustive search on instances small enough for it."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.alloc.budget import (
    NEARBY,
    Choices,
    fill,
    layer_choices,
    require_choices,
    require_exact,
    require_reachable,
    tighten,
)
from rankwise.errors import RankwiseError
from rankwise.plan import KINDS, LayerSpec

KIND_SETS = [kinds for size in (1, 2, 3) for kinds in combinations(KINDS, size)]


def energy(count: int, seed: int = 0) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).exponential(size=count))[::-1] ** 2


def make(costs: list[int], losses: list[float]) -> Choices:
    """Choices whose last one is the layer as it was."""
    ranks = np.arange(1, len(costs) + 1)
    return Choices(("pivot",) * len(costs), ranks, np.array(costs), np.array(losses), costs[-1])


def total_cost(choices: dict[str, Choices], picked: dict[str, int]) -> int:
    return sum(int(choices[name].cost[i]) for name, i in picked.items())


def total_loss(choices: dict[str, Choices], picked: dict[str, int]) -> float:
    return sum(float(choices[name].loss[i]) for name, i in picked.items())


@st.composite
def instances(draw: st.DrawFn, most_layers: int = 4, most_choices: int = 6) -> dict[str, Choices]:
    """Any rising costs with any falling losses."""
    choices = {}
    for layer in range(draw(st.integers(1, most_layers))):
        count = draw(st.integers(1, most_choices))
        costs = sorted(draw(st.sets(st.integers(1, 60), min_size=count, max_size=count)))
        losses = sorted(draw(st.lists(st.integers(0, 30), min_size=count, max_size=count)), reverse=True)
        choices[f"layer{layer}"] = make(costs, [float(loss) for loss in losses])
    return choices


# --- what a layer may become ------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(KIND_SETS), st.integers(1, 9), st.integers(0, 99))
def test_choices_are_all_that_is_worth_having(m: int, n: int, kinds: tuple[str, ...], multiple: int, seed: int) -> None:
    full, worth = min(m, n), energy(min(m, n), seed)
    found = layer_choices(m, n, worth, kinds, multiple)
    assert found.dense_cost == m * n
    listed = set(zip(found.kind, found.rank.tolist(), strict=True))
    # every listed choice: allowed, a multiple, no larger than dense, of the right cost and loss
    for kind, rank, cost, loss in zip(found.kind, found.rank, found.cost, found.loss, strict=True):
        assert kind in kinds
        spec = LayerSpec(kind, m, n, int(rank))
        assert cost == spec.parameters <= m * n
        assert kind == "dense" or (rank % multiple == 0 and rank < full and cost < m * n)
        assert loss == pytest.approx(0.0 if kind == "dense" else sum(worth[rank:]))
    assert (np.diff(found.cost) > 0).all()
    assert (np.diff(found.rank) > 0).all()
    assert (np.diff(found.loss) <= 0).all()
    # every choice left out: some listed one costs no more and keeps no less
    for kind in kinds:
        for rank in [full] if kind == "dense" else range(multiple, full, multiple):
            cost = {"dense": m * n, "lowrank": rank * (m + n), "pivot": rank * (m + n - rank)}[kind]
            if (kind, rank) not in listed and (kind == "dense" or cost < m * n):
                assert ((found.cost <= cost) & (found.rank >= rank)).any()


def test_pivot_takes_the_place_of_lowrank_at_the_same_rank() -> None:
    found = layer_choices(8, 12, energy(8), ("lowrank", "pivot", "dense"), 1)
    assert found.kind == ("pivot",) * 7 + ("dense",)
    assert found.cost.tolist() == [k * (20 - k) for k in range(1, 8)] + [96]


def test_lowrank_stops_below_dense() -> None:
    found = layer_choices(8, 12, energy(8), ("lowrank",), 1)
    assert found.rank.tolist() == [1, 2, 3, 4]  # 5 · 20 = 100 > 96
    assert layer_choices(10, 10, energy(10), ("lowrank",), 1).rank.tolist() == [1, 2, 3, 4]  # 5 · 20 = 100 = dense


def test_a_multiple_too_large_leaves_dense_or_is_refused() -> None:
    choices = {"a": layer_choices(8, 12, energy(8), KINDS, 8)}
    assert choices["a"].kind == ("dense",)
    require_choices(choices, 8)
    choices["b"] = layer_choices(8, 12, energy(8), ("lowrank", "pivot"), 8)
    with pytest.raises(RankwiseError, match="rank_multiple: 8; too large for b"):
        require_choices(choices, 8)


# --- reach ------------------------------------------------------------------------------------------------------------


def test_reach_is_worked_out_from_the_ends() -> None:
    choices = {"a": make([10, 20, 40], [3, 2, 0]), "b": make([5, 60], [1, 0])}
    for target in (15, 15.5, 100):
        require_reachable(choices, target, 100)
    for target, found in ((14.9, "0.149"), (100.1, "1.001")):
        with pytest.raises(RankwiseError, match=r"reach 0\.15 to 1$") as caught:
            require_reachable(choices, target, 100)
        assert (caught.value.field, caught.value.value) == ("ratio", found)


def test_exactness_is_relative_to_the_target() -> None:
    choices = {"a": make([10, 99, 200], [3, 2, 0])}
    require_exact(choices, {"a": 1}, 100.0, 200, 0.01)
    with pytest.raises(RankwiseError, match=r"ratio: 0\.5; .*0\.495"):
        require_exact(choices, {"a": 1}, 100.0, 200, 0.0099)


# --- fill -------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(instances(), st.floats(0, 1), st.data())
def test_fill_spends_all_that_fits_and_no_more(choices: dict[str, Choices], share: float, data: st.DataObject) -> None:
    start = {name: data.draw(st.integers(0, len(entry.kind) - 1)) for name, entry in choices.items()}
    highest = sum(int(entry.cost[-1]) for entry in choices.values())
    target = total_cost(choices, start) + share * (highest - total_cost(choices, start))
    before = dict(start)
    picked = fill(choices, start, target)
    assert start == before  # a new selection
    assert total_cost(choices, picked) <= target
    assert all(picked[name] >= at for name, at in start.items())
    left = target - total_cost(choices, picked)
    for name, at in picked.items():
        steps = choices[name].cost[at + 1 :] - choices[name].cost[at]
        assert not (steps <= left).any(), f"{name} could still take a step"


def test_fill_takes_the_best_gain_for_the_money_first() -> None:
    choices = {"poor": make([10, 20], [5, 4]), "rich": make([10, 20], [9, 2]), "middle": make([10, 20], [8, 5])}
    start = dict.fromkeys(choices, 0)
    assert fill(choices, start, 40) == {"poor": 0, "rich": 1, "middle": 0}
    assert fill(choices, start, 50) == {"poor": 0, "rich": 1, "middle": 1}
    assert fill(choices, start, 60) == {"poor": 1, "rich": 1, "middle": 1}


def test_fill_falls_back_on_what_still_fits() -> None:
    choices = {"large": make([10, 100], [50, 0]), "small": make([10, 15, 22], [2, 1, 0])}
    assert fill(choices, {"large": 0, "small": 0}, 36) == {"large": 0, "small": 2}
    assert fill(choices, {"large": 0, "small": 0}, 115) == {"large": 1, "small": 1}


# --- tighten ----------------------------------------------------------------------------------------------------------


def nearby_moves(
    choices: dict[str, Choices], picked: dict[str, int], target: float, tolerance: float
) -> list[tuple[float, dict[str, int]]]:
    """Every change of at most two layers that ends within the tolerance, with its loss."""
    options = {
        name: [to for to in range(len(choices[name].kind)) if 0 < abs(to - at) <= NEARBY] for name, at in picked.items()
    }
    moves: list[dict[str, int]] = [{name: to} for name, tos in options.items() for to in tos]
    for first, second in combinations(picked, 2):
        moves += [{first: a, second: b} for a, b in product(options[first], options[second])]
    ends = [picked | move for move in moves]
    return [
        (total_loss(choices, end), end)
        for end in ends
        if (1 - tolerance) * target <= total_cost(choices, end) + 1e-9 and total_cost(choices, end) <= target
    ]


@settings(max_examples=150, deadline=None)
@given(instances(most_choices=10), st.sampled_from([0.001, 0.02, 0.1]), st.data())
def test_tighten_finds_the_best_move_of_two_layers(
    choices: dict[str, Choices], tolerance: float, data: st.DataObject
) -> None:
    picked = {name: data.draw(st.integers(0, len(entry.kind) - 1)) for name, entry in choices.items()}
    target = float(total_cost(choices, picked) + data.draw(st.integers(0, 30)))
    left = target - total_cost(choices, picked)
    found = tighten(choices, picked, target, tolerance)
    moves = nearby_moves(choices, picked, target, tolerance)
    if left <= tolerance * target or not moves:
        assert found == picked
    else:
        assert (1 - tolerance) * target - 1e-9 <= total_cost(choices, found) <= target
        assert total_loss(choices, found) == pytest.approx(min(loss for loss, _ in moves))


def test_tighten_by_hand() -> None:
    choices = {"a": make([10, 20, 30], [6, 3, 0]), "b": make([10, 17, 30], [5, 2, 0])}
    picked = {"a": 1, "b": 0}  # cost 30 of 37
    assert tighten(choices, picked, 37, 0.01) == {"a": 1, "b": 1}
    assert tighten(choices, picked, 40, 0.01) == {"a": 2, "b": 0}  # or {"a": 0, "b": 2}: 40 as well, loss 6, not 5
    assert tighten(choices, picked, 33, 0.01) == picked  # nothing ends there
    assert tighten(choices, picked, 33, 0.1) == picked  # within already


def test_tighten_does_not_wander_far() -> None:
    choices = {"a": make(list(range(1, 60)), [0.0] * 59)}
    assert tighten(choices, {"a": 10}, 11.0 + NEARBY, 0.001) == {"a": 10 + NEARBY}
    assert tighten(choices, {"a": 10}, 12.0 + NEARBY, 0.001) == {"a": 10}
