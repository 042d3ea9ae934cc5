"""ARA: the authors' run, fault by fault, and the mended one."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.alloc.bank import Bank
from rankwise.alloc.gumbel import GumbelSigmoid
from rankwise.alloc.masks import AbsorbingStaircase, Staircase, two_level
from rankwise.alloc.methods import Ara
from rankwise.alloc.methods.trained import Task
from rankwise.alloc.objectives import capacity, capacity_table, language_loss
from rankwise.alloc.train import Step
from rankwise.errors import RankwiseError
from rankwise.plan import KINDS

SHAPES = {"a": (48, 32), "b": (32, 32), "c": (16, 32)}
IDS = torch.arange(12)[None] % 7


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def task_of(method: Ara, seed: int = 0) -> Task:
    random = np.random.default_rng(seed)
    energies = {name: np.sort(random.exponential(size=min(shape)))[::-1] ** 2 for name, shape in SHAPES.items()}
    scores: Any = SimpleNamespace(shapes=SHAPES, originals=SHAPES, removed={}, energies=energies)
    return method._task(method.choices(SHAPES, energies), scores, 0)


def step_of(task: Task, bank: Bank) -> Step:
    drawn = bank.draw(noise())
    shares = {name: task.ledger.curves[name].share(entry.rank) for name, entry in drawn.items()}
    return Step(0, IDS, torch.randn(1, 12, 7, generator=noise()), drawn, shares, [], [])


def set_shares(bank: Bank, task: Task, shares: dict[str, float]) -> None:
    for name, mask in zip(bank.names, bank.masks, strict=True):
        assert isinstance(mask, Staircase)
        mask.alpha.data = two_level(task.ledger.curves[name].rank(shares[name]) / mask.span, mask.levels)


# --- the authors' ----------------------------------------------------------------------------------------------------


def test_faithful_masks_are_the_papers() -> None:
    method = Ara(0.5, faithful=True)
    assert (method.kinds, method.rank_multiple, method.sides) == (("dense", "lowrank"), 1, "one")
    assert not method.exact
    bank = method._bank(task_of(method))
    for mask, (m, n) in zip(bank.masks, SHAPES.values(), strict=True):
        assert isinstance(mask, AbsorbingStaircase)
        assert mask.size == int(1.2 * m * n / (m + n))
        assert 1.2 * float(mask.retention().detach()) == pytest.approx(0.5, abs=1e-5)  # R = ρ q
        assert len(mask.alpha) == 101


def test_the_loss_by_hand() -> None:
    method = Ara(0.5, faithful=True)
    task = task_of(method)
    bank = method._bank(task)
    set_shares(bank, task, {"a": 0.7, "b": 0.9, "c": 0.4})
    step = step_of(task, bank)
    ratio, terms = method._objective(task, bank)(step)
    kept = (0.7 * 48 * 32 + 0.9 * 32 * 32 + 0.4 * 16 * 32) / (96 * 32)
    assert float(ratio.detach()) == pytest.approx(kept, abs=1e-5)
    assert float(terms["compression"].detach()) == pytest.approx(100 * (kept - 0.5) ** 2, rel=1e-3)
    assert float(terms["ce"]) == float(language_loss(step.logits, IDS))
    tables = {name: capacity_table(task.scores.energies[name], task.ledger.curves[name]) for name in SHAPES}
    bad = [(1 - r) for name, r in (("a", 0.7), ("b", 0.9), ("c", 0.4)) if r > capacity(tables[name], r)]
    assert float(terms["guidance"].detach()) == pytest.approx(50 * sum(bad) / 3, rel=1e-3)


def test_the_authors_budget_is_pulled_at_by_no_dense_layer() -> None:
    """min(R, 1) has no gradient above 1; mended, it has."""
    for faithful in (True, False):
        method = Ara(0.5, ("dense", "lowrank"), 1, faithful=faithful, lambda2=0.0)
        task = task_of(method)
        bank = method._bank(task)
        set_shares(bank, task, {"a": 1.1, "b": 0.5, "c": 0.5})
        _, terms = method._objective(task, bank)(step_of(task, bank))
        terms["compression"].backward()
        pulled = [float(mask.get_parameter("alpha").grad.abs().max()) > 0 for mask in bank.masks]
        assert pulled == [not faithful, True, True]


def test_the_authors_rescaling_by_hand() -> None:
    """b is dense at 0.995; the others' ranks shrink by one factor and are rounded down."""
    method = Ara(0.5, faithful=True)
    task = task_of(method)
    bank = method._bank(task)
    learnt = {"a": 0.6, "b": 0.995, "c": 0.3}
    set_shares(bank, task, learnt)
    choices, picked = method._settle(task, bank)
    kept = (0.6 * 1536 + 0.995 * 1024 + 0.3 * 512) / 3072
    factor = 1 - (kept - 0.5) * 3072 / (0.6 * 1536 + 0.3 * 512)
    found = {name: (choices[name].kind[at], int(choices[name].rank[at])) for name, at in picked.items()}
    assert found == {
        "a": ("lowrank", int(factor * 0.6 * 1536 / 80)),
        "b": ("dense", 32),
        "c": ("lowrank", int(factor * 0.3 * 512 / 48)),
    }


@pytest.mark.parametrize(
    ("learnt", "kinds", "ranks"),
    [
        ({"a": 0.98, "b": 0.2, "c": 0.2}, {"lowrank"}, None),
        ({"a": 1.1, "b": 1.1, "c": 0.3}, {"dense", "lowrank"}, {"c": 1}),  # nothing is left: the factor is negative
        ({"a": 1.1, "b": 1.1, "c": 1.1}, {"dense"}, None),
    ],
)
def test_the_authors_rescaling_at_its_ends(
    learnt: dict[str, float], kinds: set[str], ranks: dict[str, int] | None
) -> None:
    method = Ara(0.9 if ranks is None else 0.4, faithful=True)
    task = task_of(method)
    bank = method._bank(task)
    set_shares(bank, task, learnt)
    choices, picked = method._settle(task, bank)
    assert {choices[name].kind[at] for name, at in picked.items()} == kinds
    for name, at in picked.items():
        assert choices[name].cost[at] <= choices[name].dense_cost
    for name, rank in (ranks or {}).items():
        assert choices[name].rank[picked[name]] == rank


# --- mended -----------------------------------------------------------------------------------------------------------


def test_pivot_masks_cover_all_components_and_have_no_guidance() -> None:
    method = Ara(0.5, rank_multiple=1)
    assert (method.sides, method.exact) == ("two", True)
    task = task_of(method)
    bank = method._bank(task)
    assert bank.sizes == {"a": 32, "b": 32, "c": 16}
    _, terms = method._objective(task, bank)(step_of(task, bank))
    assert list(terms) == ["ce", "compression"]
    assert float(terms["compression"].detach()) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("kinds", "sizes"),
    [
        (KINDS, [32, 32, 16]),
        (("pivot",), [24, 24, 8]),
        (("dense", "lowrank"), [23, 19, 12]),
        (("lowrank",), [16, 8, 8]),
    ],
)
def test_masks_reach_as_far_as_the_kinds_allow(kinds: tuple[str, ...], sizes: list[int]) -> None:
    method = Ara(0.5, kinds, 8)
    assert list(method._bank(task_of(method)).sizes.values()) == sizes


@pytest.mark.parametrize("kinds", [KINDS, ("dense", "lowrank")], ids="+".join)
def test_training_runs_what_can_be_deployed(kinds: tuple[str, ...]) -> None:
    method = Ara(0.5, kinds, 8)
    task = task_of(method)
    bank = method._bank(task)
    for share in (0.1, 0.4, 0.77, 0.95, 1.0):
        set_shares(bank, task, dict.fromkeys(SHAPES, share))
        for name, drawn in bank.draw(noise()).items():
            entry = task.choices[name]
            nearest = int(np.argmin(np.abs(entry.cost / entry.dense_cost - share)))
            assert drawn.dense == (entry.kind[nearest] == "dense")
            assert drawn.dense or drawn.keep == entry.rank[nearest]


def test_a_dense_layer_comes_back() -> None:
    method = Ara(0.5, ("dense", "lowrank"), 1)
    task = task_of(method)
    bank = method._bank(task)
    for share, dense in ((1.15, True), (0.6, False), (1.0, True)):
        set_shares(bank, task, dict.fromkeys(SHAPES, share))
        assert {drawn.dense for drawn in bank.draw(noise()).values()} == {dense}


def test_weighted_rescaling_takes_where_it_costs_least() -> None:
    plans = {}
    for rescale in ("proportional", "weighted"):
        method = Ara(0.4, ("pivot",), 1, tolerance=0.01, rescale=rescale)
        task = task_of(method)
        steep, flat = np.exp(-np.arange(32) / 2.0), np.linspace(1.0, 0.9, 32)
        task.scores.energies.update({"a": flat, "b": steep})
        task = method._task(method.choices(SHAPES, task.scores.energies), task.scores, 0)
        bank = method._bank(task)
        set_shares(bank, task, dict.fromkeys(SHAPES, 0.6))
        choices, picked = method._settle(task, bank)
        plans[rescale] = {name: float(choices[name].cost[at] / choices[name].dense_cost) for name, at in picked.items()}
    assert plans["proportional"]["a"] == pytest.approx(plans["proportional"]["b"], abs=0.05)
    assert plans["weighted"]["b"] > plans["weighted"]["a"] + 0.1  # the steep one would lose more and more


def test_gumbel_masks_are_prefixes() -> None:
    method = Ara(0.5, rank_multiple=1, parametrisation="gumbel")
    bank = method._bank(task_of(method))
    assert all(isinstance(mask, GumbelSigmoid) for mask in bank.masks)
    assert all(isinstance(drawn.keep, int) for drawn in bank.draw(noise()).values())


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rho", 1.0),
        ("levels", 0),
        ("lambda1", -1.0),
        ("lambda2", float("nan")),
        ("parametrisation", "spline"),
        ("faithful", 1),
    ],
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(RankwiseError) as caught:
        Ara(**{option: value})
    assert caught.value.field == option


def test_the_authors_masks_are_staircases() -> None:
    with pytest.raises(RankwiseError, match="parametrisation: gumbel"):
        Ara(faithful=True, parametrisation="gumbel")


def test_faithful_keeps_other_factors_if_told_so() -> None:
    assert Ara(faithful=True, sides="two").sides == "two"
