"""STRS against exhaustive search over thresholds, and on a model against losses of the whole model."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from rankwise.alloc.budget import Choices, layer_choices
from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import collect
from rankwise.alloc.methods import Strs
from rankwise.alloc.methods.strs import Step, _learnt, cut
from rankwise.alloc.rescale import proportional
from rankwise.alloc.store import factorize_model
from rankwise.anatomy import weight_of
from rankwise.errors import RankwiseError
from rankwise.plan import RankPlan

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, 512, (3, 24), generator=torch.Generator().manual_seed(1))
GRID = (0.4, 0.6, 0.8)
LOOSE = 0.02


def make(costs: list[int]) -> Choices:
    ranks = np.arange(1, len(costs) + 1)
    loss = np.linspace(1, 0, len(costs))
    return Choices(("pivot",) * (len(costs) - 1) + ("dense",), ranks, np.array(costs), loss, costs[-1])


def total_cost(choices: dict[str, Choices], kept: dict[str, int]) -> int:
    return sum(int(choices[name].cost[at]) for name, at in kept.items())


def every_threshold(choices: dict[str, Choices], steps: list[Step], target: float) -> dict[str, int]:
    """The selection of highest cost within the target among those of all cuts; of the first cut if none is."""
    ordered = sorted(steps, key=lambda step: -step[2])
    best: dict[str, int] | None = None
    for first in range(len(ordered) + 1):
        kept = {name: len(entry.cost) - 1 for name, entry in choices.items()}
        for name, at, _ in ordered[first:]:
            kept[name] = min(kept[name], at)
        if best is None or total_cost(choices, best) <= total_cost(choices, kept) <= target:
            best = kept
    assert best is not None
    return best


def calibrate(model: Any, folder: Path, sides: str = "one") -> Calibration:
    curvature = collect(model, WINDOWS, None, folder / "curvature", device=CPU)
    store = factorize_model(model, curvature, folder / f"factors-{sides}", sides=sides, device=CPU)
    (folder / "work").mkdir(exist_ok=True)
    return Calibration(model, store, curvature, WINDOWS, folder / "work", CPU)


def allocate(method: Strs, calibration: Calibration) -> RankPlan:
    return method.allocate(calibration.factors, "fp32", calibration)


@torch.no_grad()
def truncated_loss(calibration: Calibration, name: str, rank: int, samples: int) -> float:
    model = copy.deepcopy(calibration.model)
    u, v = calibration.factors.load(name, rank)
    weight_of(model.get_submodule(name)).copy_(u @ v)
    windows = calibration.windows[:samples]
    losses = [cross_entropy(model(input_ids=w[None]).logits[0, :-1], w[1:], reduction="sum") for w in windows]
    return float(sum(losses)) / (windows.numel() - len(windows))


# --- the cut ----------------------------------------------------------------------------------------------------------


@st.composite
def instances(draw: st.DrawFn) -> tuple[dict[str, Choices], list[Step], float]:
    choices, steps = {}, []
    for layer in range(draw(st.integers(1, 4))):
        count = draw(st.integers(2, 6))
        costs = sorted(draw(st.sets(st.integers(1, 60), min_size=count, max_size=count)))
        choices[f"layer{layer}"] = make(costs)
        for at in sorted(draw(st.sets(st.integers(0, count - 2), min_size=1))):
            loss = draw(st.one_of(st.integers(0, 8).map(float), st.just(float("inf"))))  # ties, and no order
            steps.append((f"layer{layer}", at, loss))
    highest = sum(int(entry.cost[-1]) for entry in choices.values())
    return choices, steps, draw(st.floats(0, 1.1)) * highest


@settings(max_examples=300, deadline=None)
@given(instances())
def test_the_cut_is_the_best_of_all_thresholds(instance: tuple[dict[str, Choices], list[Step], float]) -> None:
    choices, steps, target = instance
    found, expected = cut(choices, steps, target), every_threshold(choices, steps, target)
    assert total_cost(choices, found) == total_cost(choices, expected)
    assert found == expected


def test_the_cut_by_hand() -> None:
    choices = {"a": make([40, 60, 100]), "b": make([40, 60, 100])}
    steps = [("a", 0, 5.0), ("a", 1, 3.0), ("b", 0, 4.0), ("b", 1, 1.0)]
    # by loss: a at 40, b at 40, a at 60, b at 60; cuts leave 80, 100, 120, 160 and 200 parameters
    for target, expected in [(99, (0, 0)), (100, (1, 0)), (130, (1, 1)), (160, (2, 1)), (199, (2, 1)), (200, (2, 2))]:
        assert cut(choices, steps, target) == dict(zip("ab", expected, strict=True))
    assert cut(choices, steps, 70) == {"a": 0, "b": 0}  # all that was tried is not enough


# --- learnt losses ----------------------------------------------------------------------------------------------------


def test_learnt_losses_pass_through_what_was_measured() -> None:
    entry = layer_choices(16, 24, np.linspace(2, 1, 16), ("dense", "pivot"), 1)
    steps = [("a", 3, 2.5), ("a", 8, 1.25), ("a", 10, 1.75), ("a", 12, 0.5)]
    loss = _learnt({"a": entry}, steps, 1.0)["a"].loss
    assert [loss[3], loss[8], loss[10], loss[12]] == [1.5, 0.75, 0.75, 0.0]  # falling, none below the dense model's
    assert loss[-1] == 0
    assert (np.diff(loss) <= 1e-12).all()
    middle = (entry.cost[5] - entry.cost[3]) / (entry.cost[8] - entry.cost[3])
    assert loss[5] == pytest.approx(1.5 - 0.75 * middle)
    assert loss[1] == pytest.approx(1.5 * entry.loss[1] / entry.loss[3])


def test_learnt_losses_stay_finite() -> None:
    entry = layer_choices(16, 24, np.zeros(16), ("dense", "pivot"), 1)
    loss = _learnt({"a": entry, "b": entry}, [("a", 2, float("inf")), ("a", 5, 1.5)], 1.0)
    assert np.isfinite(loss["a"].loss).all()
    assert loss["a"].loss[0] == loss["a"].loss[2] > 1e20
    assert np.array_equal(loss["b"].loss, entry.loss)


# --- on a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("dense", "pivot"), ("dense", "lowrank")], ids="+".join)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_plan_is_that_of_exhaustive_search(
    family: str, kinds: tuple[str, ...], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    calibration = calibrate(tiny(family), tmp_path)
    method = Strs(0.7, kinds, 1, LOOSE, grid=GRID, samples=2)
    plan = allocate(method, calibration)
    choices = method.choices(calibration.factors.shapes, calibration.factors.energies)
    steps = []
    for name, entry in choices.items():
        affordable = [max(i for i, c in enumerate(entry.cost) if c <= ratio * entry.dense_cost) for ratio in GRID]
        for at in affordable:
            m, n = calibration.factors.shapes[name]
            rank, ratio = int(entry.rank[at]), GRID[affordable.index(at)]
            costs = [k * (m + n - (k if "pivot" in kinds else 0)) for k in (rank, rank + 1)]
            assert costs[0] <= ratio * m * n < costs[1]  # the rank that the kind affords
            steps.append((name, at, truncated_loss(calibration, name, rank, 2)))
    target = 0.7 * sum(entry.dense_cost for entry in choices.values())
    kept = every_threshold(choices, steps, target)
    shares = {name: float(choices[name].cost[at] / choices[name].dense_cost) for name, at in kept.items()}
    picked = proportional(choices, shares, target)
    expected = {name: (choices[name].kind[at], int(choices[name].rank[at])) for name, at in picked.items()}
    assert {name: (spec.kind, spec.rank) for name, spec in plan} == expected
    assert len({spec.rank for _, spec in plan}) > 2
    assert abs(plan.ratio - 0.7) <= LOOSE * 0.7


def test_a_kill_in_the_middle_changes_nothing(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    method = Strs(0.6, rank_multiple=1, grid=GRID, samples=2, tolerance=LOOSE)
    whole = calibrate(model, tmp_path / "whole")
    expected = allocate(method, whole)
    parts = calibrate(model, tmp_path / "parts")

    @contextmanager
    def dies(name: str, total: int) -> Iterator[Callable[[], None]]:
        steps = iter(range(5))

        def advance() -> None:
            if next(steps, None) is None:
                raise InterruptedError

        yield advance

    for _ in range(2):
        with pytest.raises(InterruptedError):
            allocate(method, replace(parts, track=dies))
    assert allocate(method, parts) == expected
    files = [calibration.folder / "probes_one.json" for calibration in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_ratio_needs_no_new_losses(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = calibrate(tiny("llama"), tmp_path)
    plans = [allocate(Strs(0.8, rank_multiple=1, grid=GRID, samples=1, tolerance=LOOSE), calibration)]
    monkeypatch.setattr("rankwise.alloc.probes.BlockStream", lambda *args: pytest.fail("the model was run"))
    for ratio in (0.3, 0.5, 0.9, 1.0):  # beyond the grid on both sides
        plans.append(allocate(Strs(ratio, rank_multiple=1, grid=GRID, samples=1, tolerance=LOOSE), calibration))
        assert abs(plans[-1].ratio - ratio) <= LOOSE * ratio
    assert plans[-1].counts()["dense"] == len(plans[-1].layers)


def test_losses_of_other_windows_are_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    calibration = calibrate(tiny("llama"), tmp_path)
    allocate(Strs(0.8, rank_multiple=1, grid=(0.5,), samples=1, tolerance=LOOSE), calibration)
    with pytest.raises(RankwiseError, match="made with other probe_samples, probe_text"):
        allocate(Strs(0.8, rank_multiple=1, grid=(0.5,), samples=2, tolerance=LOOSE), calibration)


def test_a_layer_that_does_not_matter_is_cut_first(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj.weight.mul_(1e-4)  # its input projections matter as little
    calibration = calibrate(model, tmp_path)
    torch.manual_seed(0)  # on text of its own the model is at its best, and every other truncation hurts
    own = model.generate(torch.tensor([[5], [9]]), max_new_tokens=31, min_new_tokens=31, do_sample=True)
    method = Strs(0.85, rank_multiple=1, grid=GRID, samples=2, tolerance=LOOSE)
    plan = allocate(method, replace(calibration, windows=own))
    idle = [spec.ratio for name, spec in plan if ".1.self_attn." in name]
    assert max(idle) < 0.7
    assert max(idle) < min(spec.ratio for name, spec in plan if ".1.self_attn." not in name)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("samples", 0),
        ("samples", 1.5),
        ("grid", ()),
        ("grid", 0.5),
        ("grid", (0.5, 0.4)),
        ("grid", (0.5, 0.5)),
        ("grid", (0.5, 1.0)),
        ("grid", (0.0, 0.5)),
        ("grid", (0.5, float("nan"))),
        ("grid", ("0.5",)),
    ],
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(RankwiseError, match="allowed: ") as caught:
        Strs(**{option: value})
    assert caught.value.field == option


def test_a_grid_may_be_a_list() -> None:
    assert Strs(grid=[0.5, 0.7]) == Strs(grid=(0.5, 0.7))  # type: ignore[arg-type]
