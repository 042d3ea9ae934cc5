"""Plans that are worth a try: the best of all choices, and those of fewer that are predicted to be nearly as good."""

import numpy as np
import pytest
from spectra import MENU, drawn

import rankwise
from rankwise.alloc.joint import StoredChoices, Trust, joint_plan, plan_within
from rankwise.alloc.methods.base import Method
from rankwise.alloc.near import NEAR, TOGETHER, near_plans
from rankwise.plan import RankPlan

METHOD = rankwise.Global(rank_multiple=8)


@pytest.fixture
def any_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.alloc.near.NEAR", 1e9)


def plans(share: float, most: int, method: Method = METHOD, seed: int = 0) -> tuple[dict[str, RankPlan], int]:
    scores, table = drawn(seed)
    budget = int(share * sum(2 * m * n for m, n in scores.shapes.values()))

    def within(method: Method, choices: dict[str, StoredChoices]) -> RankPlan:
        return plan_within(method, scores, choices, budget)

    found = near_plans(method, scores, table, MENU, "bf16", within, most)
    assert TOGETHER not in found or found[TOGETHER] == joint_plan(method, scores, table, MENU, budget, "bf16")
    return found, budget


def loss(plan: RankPlan) -> float:
    return sum(spec.loss or 0.0 for _, spec in plan)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.26, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_by_prediction_comes_first_and_no_other_is_far(share: float, seed: int) -> None:
    found, budget = plans(share, 10, seed=seed)
    losses = [loss(plan) for plan in found.values()]
    assert losses == sorted(losses)
    assert losses[-1] <= NEAR * losses[0]
    assert all(plan.bytes <= budget for plan in found.values())
    layers = [plan.layers for plan in found.values()]
    assert all(one not in layers[:i] for i, one in enumerate(layers))


@pytest.mark.usefixtures("any_loss")
def test_others_are_what_they_are_called() -> None:
    found, _ = plans(0.2, 10)
    assert len(found) > 2
    for name, plan in found.items():
        if name != TOGETHER:
            assert plan.counts()["pivot"] == 0
        if name.startswith("ranks, then "):
            assert {str(spec.precision) for _, spec in plan} == {name.removeprefix("ranks, then ")}


@pytest.mark.usefixtures("any_loss")
def test_losses_are_predicted_alike() -> None:
    """One precision's ranks were chosen without rounding in mind, and yet its loss counts the rounding."""
    scores, table = drawn(0)
    found, _ = plans(0.2, 10)
    name, plan = next((name, plan) for name, plan in found.items() if name.startswith("ranks"))
    for layer, spec in plan:
        dropped = 0.0 if spec.kind == "dense" else scores.energies[layer][spec.rank :].sum()
        rounded = table.loss(layer, spec.kind, np.array([spec.rank]), spec.precision)[0]
        assert spec.loss == pytest.approx(Trust().rank * dropped / 2 + Trust().rounding * rounded), name


@pytest.mark.usefixtures("any_loss")
def test_no_more_than_asked_for() -> None:
    assert len(plans(0.2, 10)[0]) > 2
    assert len(plans(0.2, 2)[0]) == 2
    assert list(plans(0.2, 1)[0]) == [TOGETHER]


@pytest.mark.usefixtures("any_loss")
def test_kinds_that_leave_nothing_to_narrow() -> None:
    assert list(plans(0.2, 10, rankwise.Global(kinds=("pivot",), rank_multiple=8))[0]) == [TOGETHER]
    assert "no pivot layers" not in plans(0.2, 10, rankwise.Global(kinds=("dense", "lowrank"), rank_multiple=8))[0]
