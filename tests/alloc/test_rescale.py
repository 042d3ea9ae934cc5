"""One factor on all shares, against every factor that could matter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.alloc.budget import Choices, cost_of, layer_choices
from rankwise.alloc.rescale import level, proportional, within
from rankwise.errors import RankwiseError
from rankwise.plan import KINDS

KIND_SETS = [KINDS, ("dense", "lowrank"), ("pivot",), ("lowrank",), ("dense", "pivot")]


def layer(m: int, n: int, kinds: tuple[str, ...] = KINDS, multiple: int = 1) -> Choices:
    return layer_choices(m, n, np.arange(min(m, n), 0, -1.0), kinds, multiple)


def make(costs: list[int], dense: int | None = None) -> Choices:
    ranks = np.arange(1, len(costs) + 1)
    return Choices(("pivot",) * len(costs), ranks, np.array(costs), -ranks.astype(float), dense or costs[-1])


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Choices], dict[str, float], float]:
    """Layers of any shape, shares of any size, and a target in reach."""
    kinds, multiple = draw(st.sampled_from(KIND_SETS)), draw(st.sampled_from([1, 1, 2, 4]))
    sizes = st.tuples(st.integers(2 * multiple + 2, 40), st.integers(2 * multiple + 2, 40))
    choices = {f"layer{i}": layer(*draw(sizes), kinds, multiple) for i in range(draw(st.integers(1, 6)))}
    choices = {name: entry for name, entry in choices.items() if entry.kind}
    shares = {name: draw(st.one_of(st.floats(0.01, 1.5), st.sampled_from([0.0, 1.0]))) for name in choices}
    lowest, highest = (sum(int(entry.cost[end]) for entry in choices.values()) for end in (0, -1))
    return choices, shares, lowest + draw(st.floats(0, 1)) * (highest - lowest)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_budget_is_met_from_below_to_within_a_step(
    problem: tuple[dict[str, Choices], dict[str, float], float],
) -> None:
    choices, shares, target = problem
    if not choices or not any(shares.values()):
        return
    picked = proportional(choices, shares, target)
    left = target - cost_of(choices, picked)
    assert list(picked) == list(choices)
    assert left >= 0
    open_ended = [(n, at) for n, at in picked.items() if at + 1 < len(choices[n].cost)]
    steps = [int(choices[name].cost[at + 1] - choices[name].cost[at]) for name, at in open_ended]
    assert not steps or left < max(steps)  # some layer's next step does not fit


@settings(max_examples=200, deadline=None)
@given(problems())
def test_all_layers_are_served_alike(problem: tuple[dict[str, Choices], dict[str, float], float]) -> None:
    """One factor explains the selection, up to one step a layer that the left-overs bought."""
    choices, shares, target = problem
    if not choices or min(shares.values(), default=0.0) <= 0:
        return
    picked = proportional(choices, shares, target)
    candidates = sorted(
        {float(cost / entry.dense_cost / shares[name]) for name, entry in choices.items() for cost in entry.cost}
    )
    candidates = [0.0, *(value * (1 + slack) for value in candidates for slack in (-1e-9, 1e-9))]
    explained = False
    for factor in candidates:
        base = {name: within(entry, factor * shares[name]) for name, entry in choices.items()}
        explained |= all(picked[name] - at in (0, 1) for name, at in base.items())
    assert explained


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([0.125, 2.0, 1024.0]))
def test_only_proportions_count(problem: tuple[dict[str, Choices], dict[str, float], float], factor: float) -> None:
    choices, shares, target = problem
    if choices and any(shares.values()):
        scaled = {name: share * factor for name, share in shares.items()}
        assert proportional(choices, scaled, target) == proportional(choices, shares, target)


def test_by_hand() -> None:
    choices = {"a": make([10, 20, 30, 40, 100]), "b": make([10, 20, 30, 40, 100])}
    assert proportional(choices, {"a": 1.0, "b": 3.0}, 40) == {"a": 0, "b": 2}  # 0.1 and 0.3
    rough = {"a": make([10, 20, 30, 100]), "b": make([10, 25, 35, 100])}
    assert proportional(rough, {"a": 1.0, "b": 3.0}, 52) == {"a": 0, "b": 2}  # 10 of 13 and 25 of 39: b comes first
    even = dict.fromkeys("ab", make(list(range(10, 110, 10))))
    assert proportional(even, {"a": 1.0, "b": 3.0}, 120) == {"a": 2, "b": 8}
    assert proportional(even, {"a": 1.0, "b": 3.0}, 150) == {"a": 4, "b": 9}  # a has what b, full at 100, cannot use


def test_a_layer_without_a_share_is_the_last_to_grow() -> None:
    choices = {"a": make([10, 50, 100]), "b": make([10, 50, 100])}
    assert proportional(choices, {"a": 0.0, "b": 0.5}, 110) == {"a": 0, "b": 2}
    assert proportional(choices, {"a": 0.0, "b": 0.5}, 160) == {"a": 1, "b": 2}
    assert proportional(choices, {"a": 0.0, "b": 0.5}, 200) == {"a": 2, "b": 2}


def test_smallest_choices_above_their_ratio_are_paid_for_by_the_others() -> None:
    choices = {"small": make([60, 100]), "large": make([100, 300, 500, 700, 1000])}
    assert proportional(choices, {"small": 1.0, "large": 1.0}, 380) == {"small": 0, "large": 1}


def test_layers_that_cannot_be_dense_stop_at_their_largest() -> None:
    choices = {"a": make([10, 20], dense=40), "b": make([10, 20, 30, 40])}
    assert proportional(choices, {"a": 1.0, "b": 0.5}, 50) == {"a": 1, "b": 2}  # 20 + 30


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, None])
def test_shares_that_are_none_name_their_layer(value: float | None) -> None:
    shares = {"a": 1.0} | ({} if value is None else {"b": value})
    with pytest.raises(RankwiseError, match="allowed: a finite number from 0") as caught:
        proportional({"a": make([1, 2]), "b": make([1, 2])}, shares, 3)
    assert caught.value.field == "share of b"


def test_at_least_one_share_is_needed() -> None:
    with pytest.raises(RankwiseError, match="shares: 0"):
        proportional({"a": make([1, 2])}, {"a": 0.0}, 2)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=8),
    st.floats(0.001, 1.2),
)
def test_level_shares_out_all_that_there_is(layers: list[tuple[float, float]], part: float) -> None:
    weights = {str(i): weight for i, (weight, _) in enumerate(layers)}
    caps = {str(i): cap for i, (_, cap) in enumerate(layers)}
    total = part * sum(caps.values())
    factor = level(weights, caps, total)
    given_out = sum(min(factor * weights[name], caps[name]) for name in caps)
    assert given_out == pytest.approx(min(total, sum(caps.values())), rel=1e-9)


def test_within_is_the_largest_choice_that_fits() -> None:
    entry = make([10, 20, 40, 100])
    assert [within(entry, ratio) for ratio in (0.05, 0.1, 0.19, 0.2, 0.99, 1.0)] == [0, 0, 0, 1, 2, 3]
