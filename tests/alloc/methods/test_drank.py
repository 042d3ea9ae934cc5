"""D-Rank's closed form against the optimum of its stated objective, found by a general solver."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from spectra import Whole

from rankwise.alloc.methods import DRank
from rankwise.alloc.methods.drank import effective_rank, rebalance
from rankwise.errors import RankwiseError

SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}


@dataclass
class Spectra(Whole):
    """Shapes and energies, as a store of factors has them."""

    shapes: dict[str, tuple[int, int]]
    energies: dict[str, np.ndarray]


def spectra(blocks: int = 4, seed: int = 0) -> Spectra:
    """Slopes of all kinds: effective ranks from 1 to nearly full."""
    random = np.random.default_rng(seed)
    shapes = {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in SHAPES.items()}
    energies = {n: np.exp(-random.uniform(0.01, 1.5) * np.arange(min(s))) * 10 for n, s in shapes.items()}
    return Spectra(shapes, energies)


def solve(ranks: np.ndarray, omega: np.ndarray, caps: np.ndarray, total: float) -> np.ndarray:
    """k of least `Σ R / k` under `Σ k ω = T` and `k ω ≤ dense`, by sequential least squares on scaled variables."""
    size = caps / omega

    def objective(x: np.ndarray) -> float:
        return float((ranks / (x * size)).sum())

    spent = {"type": "eq", "fun": lambda x: float((x * caps).sum() / total - 1)}
    start = np.full(len(ranks), total / caps.sum())
    bounds = [(1e-3, 1.0)] * len(ranks)
    found = minimize(objective, start, bounds=bounds, constraints=[spent], method="SLSQP", options={"maxiter": 2000})
    assert found.success
    return np.asarray(found.x) * size


# --- effective rank ---------------------------------------------------------------------------------------------------


def test_effective_rank_by_hand() -> None:
    assert effective_rank(np.array([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(np.full(5, 0.2)) == pytest.approx(5)
    assert effective_rank(np.array([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)  # entropy 1.5 bits
    assert effective_rank(np.array([2.0, 1.0, 1.0]) * 1e-200) == pytest.approx(2**1.5)
    assert effective_rank(np.array([1e6, 1e-320])) == pytest.approx(1)  # a share that underflows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_effective_rank_lies_between_one_and_full(energy: list[float]) -> None:
    assert 1 - 1e-9 <= effective_rank(np.array(energy)) <= len(energy) + 1e-9


@pytest.mark.parametrize(("value", "expected"), [(np.inf, 7), (np.nan, 7), (0.0, 1)])
def test_effective_rank_of_unknown_and_of_nothing(value: float, expected: float) -> None:
    assert effective_rank(np.full(7, value)) == expected


# --- the closed form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.2, 0.4])
@pytest.mark.parametrize("pool", ["type", "model"])
def test_ranks_by_hand(pool: str, ratio: float) -> None:
    """k = T √(R / ω) / Σ √(R ω), where nothing is capped."""
    random = np.random.default_rng(1)
    scores = spectra()
    scores.energies = {n: np.exp(-random.uniform(0.1, 0.3) * np.arange(min(s))) for n, s in scores.shapes.items()}
    found = DRank(ratio, rank_multiple=1, pool=pool).parameters(scores)
    for kind in SHAPES:
        group = [name for name in scores.shapes if pool == "model" or name.endswith(kind)]
        budget = ratio * sum(m * n for m, n in (scores.shapes[name] for name in group))
        r_eff, omega = {}, {}
        for name in group:
            p = scores.energies[name] / scores.energies[name].sum()
            r_eff[name] = math.exp(-sum(x * math.log(x) for x in p))
            omega[name] = sum(scores.shapes[name])
        bottom = sum(math.sqrt(r_eff[name] * omega[name]) for name in group)
        for name in group:
            rank = budget * math.sqrt(r_eff[name] / omega[name]) / bottom
            assert found[name] == pytest.approx(rank * omega[name])


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_are_the_optimum_of_the_objective_caps_included(ratio: float, seed: int) -> None:
    scores = spectra(blocks=2, seed=seed)
    found = DRank(ratio, rank_multiple=1, pool="model").parameters(scores)
    names = list(scores.shapes)
    ranks = np.array([effective_rank(scores.energies[name]) for name in names])
    omega = np.array([float(sum(scores.shapes[name])) for name in names])
    caps = np.array([float(math.prod(scores.shapes[name])) for name in names])
    best = solve(ranks, omega, caps, ratio * caps.sum())
    ours = np.array([found[name] for name in names]) / omega
    assert (ours * omega).sum() == pytest.approx(ratio * caps.sum())
    assert (ranks / ours).sum() == pytest.approx((ranks / best).sum(), rel=1e-5)
    assert ours == pytest.approx(best, rel=2e-2)
    assert (ours * omega <= caps * (1 + 1e-12)).all()
    if ratio == 0.85:
        assert (ours * omega >= caps * (1 - 1e-12)).any()  # the caps were at work


def test_one_budget_for_each_type_keeps_its_ratio() -> None:
    scores = spectra()
    found = DRank(0.5, rank_multiple=1).parameters(scores)
    for kind, (m, n) in SHAPES.items():
        group = [value for name, value in found.items() if name.endswith(kind)]
        assert sum(group) == pytest.approx(0.5 * len(group) * m * n)


# --- queries and keys to values ---------------------------------------------------------------------------------------


def test_rebalancing_by_hand() -> None:
    given = {"0.q_proj": 100.0, "0.k_proj": 50.0, "0.v_proj": 10.0, "0.up": 70.0, "1.q_proj": 40.0, "1.v_proj": 20.0}
    caps = dict.fromkeys(given, 1000.0)
    found = rebalance(given, caps, 0.1)  # 10 + 5 + 4 of it, half to each value
    assert found == pytest.approx(
        {"0.q_proj": 90, "0.k_proj": 45, "0.v_proj": 19.5, "0.up": 70, "1.q_proj": 36, "1.v_proj": 29.5}
    )


def test_what_values_cannot_take_goes_back() -> None:
    given = {"q_proj": 100.0, "k_proj": 50.0, "v_proj": 20.0}
    found = rebalance(given, {"q_proj": 100.0, "k_proj": 100.0, "v_proj": 26.0}, 0.2)  # 6 of the 30 fit
    assert found == pytest.approx({"q_proj": 96, "k_proj": 48, "v_proj": 26})
    full = rebalance(given, {"q_proj": 100.0, "k_proj": 100.0, "v_proj": 20.0}, 0.2)
    assert full == pytest.approx(given)


@pytest.mark.parametrize(
    "given", [{"attn.c_attn": 3.0, "mlp.c_fc": 4.0}, {"q_proj": 3.0, "k_proj": 4.0}, {"v_proj": 1.0}]
)
def test_without_all_three_nothing_moves(given: dict[str, float]) -> None:
    assert rebalance(given, dict.fromkeys(given, 9.0), 0.5) == given


def test_beta_shows_in_the_plan() -> None:
    scores = spectra()
    plain, moved = (DRank(0.5, rank_multiple=1, beta=beta, tolerance=0.01).allocate(scores) for beta in (0.0, 0.5))
    for kind, sign in (("q_proj", -1), ("k_proj", -1), ("v_proj", 1)):
        before, after = (sum(s.parameters for n, s in plan if n.endswith(kind)) for plan in (plain, moved))
        assert (after - before) * sign > 0.1 * before


# --- plans ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.2, 1),
    st.sampled_from([("dense", "lowrank"), ("dense", "lowrank", "pivot"), ("dense", "pivot")]),
    st.sampled_from([1, 2]),
    st.sampled_from([0.0, 0.2, 0.9]),
    st.sampled_from(["type", "model"]),
    st.integers(0, 99),
)
def test_budgets_are_exact(
    ratio: float, kinds: tuple[str, ...], multiple: int, beta: float, pool: str, seed: int
) -> None:
    plan = DRank(ratio, kinds, multiple, 0.01, beta=beta, pool=pool).allocate(spectra(seed=seed))
    assert abs(plan.ratio - ratio) <= 0.01 * ratio
    assert all(spec.parameters <= spec.dense_parameters for _, spec in plan)


def test_layers_of_higher_effective_rank_keep_more() -> None:
    shapes = {f"h.{i}.fc": (32, 32) for i in range(4)}
    energies = dict(zip(shapes, [np.exp(-slope * np.arange(32)) for slope in (2, 1, 0.3, 0.05)], strict=True))
    plan = DRank(0.4, rank_multiple=1, tolerance=0.1).allocate(Spectra(shapes, energies))
    ranks = [spec.rank for _, spec in plan]
    assert ranks == sorted(ranks)
    assert ranks[-1] > 2 * ranks[0]


@pytest.mark.parametrize("value", [np.inf, np.nan, 0.0])
def test_unknown_and_zero_energies_leave_a_plan(value: float) -> None:
    scores = spectra()
    for name in list(scores.energies)[::3]:
        scores.energies[name] = np.full_like(scores.energies[name], value)
    assert abs(DRank(0.6, rank_multiple=1, tolerance=0.01).allocate(scores).ratio - 0.6) <= 0.006


@pytest.mark.parametrize(
    ("option", "value"),
    [("beta", -0.1), ("beta", 1), ("beta", float("nan")), ("beta", "0.2"), ("beta", True), ("pool", "block")],
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(RankwiseError, match="allowed: ") as caught:
        DRank(**{option: value})
    assert caught.value.field == option
