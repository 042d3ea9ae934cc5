"""The global allocation against every selection there is, on instances small enough to list them all."""

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import Whole

from rankwise.alloc.methods import Global, Uniform
from rankwise.errors import RankwiseError
from rankwise.plan import KINDS, RankPlan

LOOSE = 1.0  # any miss will do: what is tested is the selection, not the last bit of the budget


@dataclass
class Spectra(Whole):
    """Shapes and energies, as a store of factors has them."""

    shapes: dict[str, tuple[int, int]]
    energies: dict[str, np.ndarray]

    @property
    def total(self) -> int:
        return sum(m * n for m, n in self.shapes.values())

    def scaled(self, factor: float) -> "Spectra":
        return Spectra(self.shapes, {name: energy * factor for name, energy in self.energies.items()})


def spectra(shapes: list[tuple[int, int]], seed: int = 0) -> Spectra:
    random = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(len(shapes))]
    energies = [
        np.sort(random.exponential(10 ** random.uniform(-1, 1), min(shape)))[::-1] ** random.uniform(1, 3)
        for shape in shapes
    ]
    return Spectra(dict(zip(names, shapes, strict=True)), dict(zip(names, energies, strict=True)))


def options(m: int, n: int, energy: np.ndarray, kinds: tuple[str, ...]) -> list[tuple[int, float]]:
    """Cost and loss of everything that a layer may become, without any cleverness."""
    found = [(m * n, 0.0)] if "dense" in kinds else []
    for rank in range(1, min(m, n)):
        lost = float(energy[rank:].sum())
        if "pivot" in kinds:
            found.append((rank * (m + n - rank), lost))
        if "lowrank" in kinds and rank * (m + n) < m * n:
            found.append((rank * (m + n), lost))
    return found


def everything(scores: Spectra, kinds: tuple[str, ...]) -> np.ndarray:
    """`[selections, 2]`: total cost and total loss of every selection."""
    per_layer = [options(m, n, scores.energies[name], kinds) for name, (m, n) in scores.shapes.items()]
    return np.array([np.sum(selection, axis=0) for selection in product(*per_layer)])


def hull(points: np.ndarray) -> list[tuple[float, float]]:
    """Lower convex hull of (cost, loss), the part where loss falls."""
    corners: list[tuple[float, float]] = []
    for cost, loss in sorted(map(tuple, points)):
        if corners and loss >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (c1, l1), (c2, l2) = corners[-2:]
            if (l2 - l1) * (cost - c1) < (loss - l1) * (c2 - c1):
                break
            corners.pop()
        corners.append((cost, loss))
    return corners


def predicted(plan: RankPlan) -> float:
    return 2 * sum(spec.loss or 0.0 for _, spec in plan)


def lost(plan: RankPlan, scores: Spectra) -> float:
    return sum(0.0 if s.kind == "dense" else float(scores.energies[name][s.rank :].sum()) for name, s in plan)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=3),
    st.sampled_from([KINDS, ("dense", "lowrank"), ("dense", "pivot"), ("pivot",)]),
    st.floats(0, 1),
    st.integers(0, 999),
)
def test_no_worse_than_the_corner_of_the_hull_below_the_budget(
    shapes: list[tuple[int, int]], kinds: tuple[str, ...], share: float, seed: int
) -> None:
    scores = spectra(shapes, seed)
    points = everything(scores, kinds)
    lowest, highest = points[:, 0].min(), points[:, 0].max()
    ratio = (lowest + share * (highest - lowest)) / scores.total
    target = ratio * scores.total
    try:
        plan = Global(ratio, kinds, 1, LOOSE).allocate(scores)
    except RankwiseError:
        assert target < lowest or target > highest  # by rounding, at the very ends
        return
    ours, slack = lost(plan, scores), 1e-9 * points[:, 1].max()
    assert plan.parameters <= target
    best = points[points[:, 0] <= target][:, 1].min()
    below = [loss for cost, loss in hull(points) if cost <= target]
    assert best - slack <= ours <= (below[-1] if below else np.inf) + slack
    assert predicted(plan) == pytest.approx(ours)


@pytest.mark.parametrize("seed", range(10))
def test_convex_instances_are_solved_to_within_one_step(seed: int) -> None:
    """Low ranks cost the same each and are worth less each: then only the last step can be missed."""
    random = np.random.default_rng(seed)
    shapes = [tuple(map(int, random.integers(6, 14, 2))) for _ in range(3)]
    scores = spectra(shapes, seed)
    points = everything(scores, ("lowrank",))
    step = max(m + n for m, n in shapes)
    for target in np.linspace(points[:, 0].min() + step, points[:, 0].max(), 7):
        plan = Global(float(target) / scores.total, ("lowrank",), 1, LOOSE).allocate(scores)
        best, best_with_less = (points[points[:, 0] <= budget + 1e-9][:, 1].min() for budget in (target, target - step))
        assert plan.parameters <= target + 1e-9
        assert best - 1e-9 <= lost(plan, scores) <= best_with_less + 1e-9


def test_a_budget_on_a_corner_is_solved_exactly() -> None:
    scores = spectra([(9, 9), (7, 12), (12, 8)], seed=5)
    points = everything(scores, KINDS)
    corners = hull(points)
    assert len(corners) > 5
    for cost, loss in corners:
        plan = Global(cost / scores.total, KINDS, 1, 1e-9).allocate(scores)
        assert plan.parameters == cost
        assert lost(plan, scores) == pytest.approx(loss, abs=1e-9)


def test_nothing_beats_it_at_equal_budget_by_chance() -> None:
    scores = spectra([(32, 32), (48, 32), (32, 48), (16, 32)] * 3, seed=2)
    for ratio in (0.4, 0.6, 0.8, 0.9):
        ours = Global(ratio, rank_multiple=1).allocate(scores)
        uniform = Uniform(ratio, rank_multiple=1, sides="two").allocate(scores)
        assert lost(ours, scores) < lost(uniform, scores)


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("sides", ["one", "two"])
def test_scale_of_the_loss_does_not_matter(sides: str, factor: float) -> None:
    scores = spectra([(32, 32), (48, 32), (32, 48)] * 2)
    method = Global(0.6, rank_multiple=1, sides=sides, tolerance=0.05)
    plan, scaled = method.allocate(scores), method.allocate(scores.scaled(factor))
    assert [(s.kind, s.rank) for _, s in plan] == [(s.kind, s.rank) for _, s in scaled]


def test_one_sided_energies_count_as_shares_of_their_layer() -> None:
    scores = spectra([(32, 32), (48, 32), (32, 48)])
    louder = Spectra(scores.shapes, scores.energies | {"layer1": scores.energies["layer1"] * 1e6})
    one, two = (Global(0.6, rank_multiple=1, sides=sides, tolerance=0.05) for sides in ("one", "two"))

    def ranks(method: Global, given: Spectra) -> list[tuple[str, int]]:
        return [(spec.kind, spec.rank) for _, spec in method.allocate(given)]

    assert ranks(one, scores) == ranks(one, louder)
    assert ranks(two, scores) != ranks(two, louder)


def test_what_matters_more_keeps_more() -> None:
    flat, steep = np.full(32, 1.0), np.logspace(0, -8, 32)
    scores = Spectra({"flat": (32, 32), "steep": (32, 32)}, {"flat": flat, "steep": steep})
    plan = Global(0.7, ("pivot",), 1, tolerance=0.05).allocate(scores)
    assert plan.layers["flat"].rank > 2 * plan.layers["steep"].rank


@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9])
def test_layers_never_seen_stay_dense_while_the_budget_allows(ratio: float, sides: str) -> None:
    scores = spectra([(32, 32), (48, 32), (32, 48), (32, 32)] * 2)
    unseen = ("layer1", "layer6")
    for name in unseen:
        scores.energies[name] = np.full(32, np.inf)
    plan = Global(ratio, rank_multiple=1, sides=sides).allocate(scores)
    assert all(plan.layers[name].kind == "dense" for name in unseen)
    assert all(plan.layers[name].energy is None for name in unseen)
    assert len(plan.compressed) > 1


def test_layers_never_seen_are_the_last_to_shrink() -> None:
    scores = spectra([(32, 32)] * 3)
    scores.energies["layer1"] = np.full(32, np.inf)
    plan = Global(0.25, rank_multiple=1, tolerance=0.05).allocate(scores)  # dense alone would be a third
    assert plan.layers["layer0"].rank == plan.layers["layer2"].rank == 1
    assert plan.layers["layer1"].rank > 5


def test_components_worth_nothing_are_given_up_first() -> None:
    scores = spectra([(32, 32)] * 4)
    scores.energies["layer2"][5:] = 0
    plan = Global(0.8, ("dense", "pivot"), 1, tolerance=0.05).allocate(scores)
    assert plan.layers["layer2"].rank >= 5
    assert lost(plan, scores) < lost(Uniform(0.8, ("dense", "pivot"), 1, tolerance=0.05).allocate(scores), scores)


def test_more_budget_never_hurts_where_it_matters() -> None:
    scores = spectra([(32, 32), (48, 32), (32, 48)] * 2, seed=4)
    losses = [
        lost(Global(ratio, rank_multiple=1, tolerance=0.01).allocate(scores), scores)
        for ratio in np.arange(0.2, 1.0, 0.1)
    ]
    assert all(more < less for less, more in pairwise(losses))
