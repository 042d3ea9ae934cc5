"""From learnt shares to a selection: learnt losses, and what stays dense."""

import numpy as np
import pytest

from rankwise.alloc.budget import Choices, cost_of, layer_choices
from rankwise.alloc.learnt import Ordered, Spend, learnt_choices, settle
from rankwise.alloc.methods import Global
from rankwise.alloc.rescale import proportional
from rankwise.plan import KINDS

SHAPES = {"a": (64, 64), "b": (48, 80), "c": (80, 48), "d": (64, 64)}


def layers(kinds: tuple[str, ...] = KINDS, decay: float = 12.0) -> dict[str, Choices]:
    """Convex losses of very different heights."""
    heights = dict(zip(SHAPES, (1e-3, 1.0, 50.0, 7.0), strict=True))
    return {
        name: layer_choices(m, n, heights[name] * np.exp(-np.arange(min(m, n)) / decay), kinds, 1)
        for name, (m, n) in SHAPES.items()
    }


def shares_of(choices: dict[str, Choices], picked: dict[str, int]) -> dict[str, float]:
    return {name: float(entry.cost[picked[name]] / entry.dense_cost) for name, entry in choices.items()}


def spend(shares: dict[str, float]) -> Spend:
    return lambda some, budget: proportional(some, shares, budget)


def test_every_layer_loses_the_same_per_parameter_at_its_learnt_share() -> None:
    shares = {"a": 0.7, "b": 0.3, "c": 0.5, "d": 0.6}
    for name, entry in learnt_choices(layers(), shares).items():
        at = int(np.argmin(np.abs(entry.cost / entry.dense_cost - shares[name])))
        slope = -np.gradient(entry.loss, entry.cost)[at]
        assert slope == pytest.approx(1, rel=0.15)
        assert (np.diff(entry.loss) <= 0).all()


def test_a_lagrangian_fill_gives_the_learnt_shares_back() -> None:
    choices, shares = layers(), {"a": 0.7, "b": 0.3, "c": 0.5, "d": 0.6}
    target = sum(shares[name] * entry.dense_cost for name, entry in choices.items())
    learnt = learnt_choices(choices, shares)
    picked = Global()._pick(learnt, None, target)  # type: ignore[arg-type]
    assert shares_of(learnt, picked) == pytest.approx(shares, abs=0.03)
    without = Global()._pick(choices, None, target)  # type: ignore[arg-type]
    assert shares_of(choices, without)["a"] < 0.3  # by its predicted losses alone it would be all but gone


def test_less_budget_is_taken_from_every_layer() -> None:
    choices, shares = layers(), {"a": 0.7, "b": 0.3, "c": 0.5, "d": 0.6}
    target = 0.8 * sum(shares[name] * entry.dense_cost for name, entry in choices.items())
    found = shares_of(choices, Global()._pick(learnt_choices(choices, shares), None, target))  # type: ignore[arg-type]
    assert all(found[name] < shares[name] for name in shares)


def test_level_losses_stay_as_they_are() -> None:
    choices = {"a": layer_choices(8, 8, np.zeros(8), KINDS, 1)}
    assert (learnt_choices(choices, {"a": 0.5})["a"].loss == 0).all()
    single = {"a": layer_choices(8, 8, np.ones(8), ("dense",), 1)}
    assert (learnt_choices(single, {"a": 1.0})["a"].loss == single["a"].loss).all()


def test_layers_that_learnt_to_be_dense_stay_so() -> None:
    choices, shares = layers(), {"a": 1.0, "b": 0.5, "c": 0.4, "d": 0.3}
    target = 0.55 * sum(entry.dense_cost for entry in choices.values())
    picked = settle(choices, shares, target, spend(shares))
    found = shares_of(choices, picked)
    assert list(picked) == list(choices)
    assert found["a"] == 1
    assert found["b"] / found["d"] == pytest.approx(5 / 3, rel=0.1)
    assert 0.99 * target < cost_of(choices, picked) <= target


@pytest.mark.parametrize("kinds", [KINDS, ("pivot",)], ids="+".join)
def test_too_many_dense_layers_are_scaled_as_the_others(kinds: tuple[str, ...]) -> None:
    choices = layers(kinds)
    target = 0.3 * sum(entry.dense_cost for entry in choices.values())
    shares = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.99}
    found = shares_of(choices, settle(choices, shares, target, spend(shares)))
    assert max(found.values()) < 0.4


def test_all_dense_is_all_dense() -> None:
    choices = layers()
    shares = dict.fromkeys(choices, 1.0)
    whole = settle(choices, shares, sum(entry.dense_cost for entry in choices.values()), spend(shares))
    assert set(shares_of(choices, whole).values()) == {1}


def test_ordered_choices_keep_the_dearest_components() -> None:
    plain = layer_choices(6, 6, np.ones(6), KINDS, 1)
    entry = Ordered(plain.kind, plain.rank, plain.cost, plain.loss, plain.dense_cost, np.array([0, 4, 1, 2, 5, 3]))
    assert plain.rank.tolist() == [1, 2, 3, 4, 5, 6]
    assert [entry.kept(at) for at in range(6)] == [None, (0, 4), (0, 1, 4), (0, 1, 2, 4), (0, 1, 2, 4, 5), None]
