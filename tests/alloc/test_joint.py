"""Kind, rank and precision under one budget of bytes: exact, never exceeded, and as good as trying everything."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fourbit import wide_model
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import MENU, drawn

import rankwise
from rankwise.alloc.curvature import collect
from rankwise.alloc.joint import Trust, joint_plan, stored_choices
from rankwise.alloc.precisions import RoundingTable, measure_rounding
from rankwise.alloc.rounder import Rounder
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.anatomy import block_linears, weight_of
from rankwise.errors import RankwiseError
from rankwise.pipeline import compress
from rankwise.plan import KINDS
from rankwise.storage import Precision

CPU = torch.device("cpu")
PRECISIONS = (Precision("fp32"), Precision("nf4"), Precision("int4", 32))
METHOD = rankwise.Global(rank_multiple=8)


class Source:
    """A wide model, its factors and its table."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, wide_model(hidden=128, intermediate=256)
        windows = torch.randint(2, 512, (6, 48), generator=torch.Generator().manual_seed(1))
        self.curvature = collect(self.model, windows[:4], windows[4:], folder / "curvature", device=CPU)
        self.store: FactorStore = factorize_model(
            self.model, self.curvature, folder / "factors", sides="two", device=CPU
        )
        self.table = self.measure(folder / "table")

    def measure(self, folder: Path) -> RoundingTable:
        return measure_rounding(self.model, self.curvature, self.store, PRECISIONS, KINDS, folder, device=CPU)

    def plan(self, budget: int, method: Any = METHOD, precisions: Any = PRECISIONS, **options: Any) -> Any:
        return joint_plan(method, self.store, self.table, precisions, budget, "fp32", **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("joint"))


def dense_bytes(source: Source) -> int:
    return sum(4 * m * n for m, n in source.store.shapes.values())


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 5), share=st.floats(0.06, 1.2), multiple=st.sampled_from([1, 8]))
def test_budgets_are_met_and_never_exceeded(seed: int, share: float, multiple: int) -> None:
    """What is left over is less than the next step of any layer, and little where steps are small."""
    scores, table = drawn(seed)
    total = sum(2 * m * n for m, n in scores.shapes.values())
    method, budget = rankwise.Global(rank_multiple=multiple), int(share * total)
    plan = joint_plan(method, scores, table, MENU, budget, "bf16")
    assert plan.bytes <= budget
    left, allowed = budget - plan.bytes, [(kind, precision) for kind in KINDS for precision in MENU]
    for name, spec in plan:
        costs = stored_choices(method, name, scores, table, allowed, Trust()).cost
        dearer = costs[costs > spec.bytes]
        assert not len(dearer) or dearer[0] - spec.bytes > left
    if share < 0.25:  # all in 4 bits
        assert plan.bytes > 0.999 * budget


def test_more_bytes_never_lose_more(source: Source) -> None:
    losses = [
        sum(spec.loss for _, spec in source.plan(int(share * dense_bytes(source))))
        for share in np.linspace(0.07, 1.0, 12)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_every_precision_alone_loses_more(source: Source) -> None:
    for precision in PRECISIONS[1:]:
        alone = source.plan(10**9, precisions=(precision,), method=rankwise.Global(kinds=("dense",)))
        assert {spec.precision for _, spec in alone} == {precision}
        together = source.plan(alone.bytes)
        assert sum(s.loss for _, s in together) <= sum(s.loss for _, s in alone)


def test_as_good_as_trying_everything(source: Source) -> None:
    """Two layers, every pair of choices: the plan is the best one, or the best of the hull and what still fits."""
    names = list(source.store.shapes)[:2]
    few = {name: _few(source, name) for name in names}
    costs, losses = ({name: getattr(entry, field) for name, entry in few.items()} for field in ("cost", "loss"))
    for budget in np.linspace(costs[names[0]][0] + costs[names[1]][0], 2 * costs[names[0]][-1], 9):
        pairs = itertools.product(*(range(len(costs[name])) for name in names))
        fitting = [pair for pair in pairs if sum(costs[n][i] for n, i in zip(names, pair, strict=True)) <= budget]
        best = min(sum(losses[n][i] for n, i in zip(names, pair, strict=True)) for pair in fitting)
        picked = METHOD._pick(dict(few), source.store, budget)
        found = sum(losses[n][i] for n, i in picked.items())
        assert sum(costs[n][i] for n, i in picked.items()) <= budget
        assert found <= best + 0.25 * (max(losses[names[0]]) + max(losses[names[1]]))
        assert found >= best - 1e-12


def _few(source: Source, name: str) -> Any:
    allowed = [(kind, precision) for kind in KINDS for precision in PRECISIONS]
    return stored_choices(METHOD, name, source.store, source.table, allowed, Trust())


def test_choices_fall_in_loss_as_they_rise_in_bytes(source: Source) -> None:
    for name in source.store.shapes:
        entry = _few(source, name)
        assert (np.diff(entry.cost) > 0).all()
        assert (np.diff(entry.loss) < 0).all()
        assert {len(entry.kind), len(entry.rank), len(entry.precision)} == {len(entry.cost)}
        assert entry.kind[-1] == "dense"
        assert entry.precision[-1] == PRECISIONS[0]


def test_predictions_come_near_to_what_rounding_costs(source: Source, tmp_path: Path) -> None:
    """Of a whole plan, in the metric itself: the table's sum against the layers that were really rounded."""
    plan = source.plan(int(0.11 * dense_bytes(source)), trust=Trust(1.0, 1.0))
    assert plan.quantised
    blocks = [list(block) for block in block_linears(source.model)]
    model = copy.deepcopy(source.model)
    dense = {name: weight_of(m).double() for block in block_linears(source.model) for name, m in block.items()}
    compress(model, plan, source.store, rounding=Rounder(source.curvature, blocks, tmp_path, dense.__getitem__))
    real = 0.0
    for index, block in enumerate(blocks):
        c, f = source.curvature.metric(index)
        for name in block:
            layer, n = model.get_submodule(name), plan.layers[name].in_features
            off = layer(torch.eye(n)).T.double() - dense[name]
            real += float(((f[name].double() @ off) * (off @ c[name].double())).sum()) / 2
    assert sum(spec.loss for _, spec in plan) == pytest.approx(real, rel=0.35)


def test_the_table_is_made_once(source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    again = source.measure(tmp_path / "again")
    assert again.layers == source.table.layers
    assert again.ratios == source.table.ratios
    assert all(0.1 < ratio < 10 for ratio in again.ratios.values())
    assert {key.split()[0] for key in again.ratios} == set(KINDS)
    (tmp_path / "again" / "rounding_001.json").unlink()
    resumed = source.measure(tmp_path / "again")
    assert resumed.layers == source.table.layers
    monkeypatch.setattr("rankwise.alloc.precisions._Look", pytest.fail)
    assert source.measure(tmp_path / "again").layers == source.table.layers


def test_pinned_layers_cost_what_they_are(source: Source) -> None:
    method = rankwise.Global(rank_multiple=8, keep=("*.mlp.*",))
    pinned = sum(4 * m * n for name, (m, n) in source.store.shapes.items() if "mlp" in name)
    plan = source.plan(int(1.05 * pinned), method)
    assert all(s.kind == "dense" and s.weights == "fp32" for name, s in plan if "mlp" in name)
    with pytest.raises(RankwiseError, match=r"^budget: .*the smallest possible: \d+ bytes"):
        source.plan(pinned, method)


def test_nothing_to_choose_from(source: Source) -> None:
    method = rankwise.Global(kinds=("lowrank",), rank_multiple=512)
    with pytest.raises(RankwiseError, match=r"^weights: nothing that .* can be"):
        source.plan(10**9, method)


@pytest.mark.parametrize("make", [lambda: Trust(), lambda: Trust(1.0, 1.0)])
def test_trust_moves_losses_between_ranks_and_rounding(source: Source, make: Callable[[], Trust]) -> None:
    """The more a dropped component is held to cost, the less is dropped."""
    budget = int(0.08 * dense_bytes(source))

    def dropped(trust: Trust) -> float:
        plan = source.plan(budget, trust=trust)
        return sum(float(source.store.energies[n][s.rank :].sum()) for n, s in plan if s.kind != "dense")

    assert dropped(Trust(100.0, 1.0)) < dropped(make()) < dropped(Trust(0.01, 1.0))
