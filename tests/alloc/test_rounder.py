"""Layers rounded by the curvature: the right metric, the right target, and nothing done twice."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from fourbit import in_turn, wide_model

import rankwise
from rankwise.alloc import rounder as module
from rankwise.alloc.curvature import Curvature, collect
from rankwise.alloc.rounder import Rounder, grid_of
from rankwise.alloc.rounding import round_dense, round_lowrank, round_pivot
from rankwise.alloc.scales import decoded
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.anatomy import block_linears, weight_of
from rankwise.errors import RankwiseError
from rankwise.kernels.int4 import Int4, dequantize_int4
from rankwise.kernels.int8 import Int8, dequantize_int8
from rankwise.kernels.nf4 import NF4, dequantize_nf4
from rankwise.pipeline import compress
from rankwise.plan import RankPlan
from rankwise.storage import Precision

CPU = torch.device("cpu")
PRECISIONS = [Precision("int4", 32), Precision("nf4"), Precision("int4", 32, True), Precision("int8")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Curvature, FactorStore, RankPlan]:
    folder, model = tmp_path_factory.mktemp("rounder"), wide_model()
    windows = torch.randint(2, 512, (6, 48), generator=torch.Generator().manual_seed(1))
    curvature = collect(model, windows[:4], windows[4:], folder / "curvature", device=CPU)
    store = factorize_model(model, curvature, folder / "factors", sides="two", device=CPU)
    plan = rankwise.Global(0.9).allocate(store, "fp32")
    return model, curvature, store, in_turn(plan, PRECISIONS)


@pytest.fixture
def rounder(source: Any, tmp_path: Path) -> Callable[..., Rounder]:
    model, curvature = source[:2]
    blocks = [list(block) for block in block_linears(model)]

    def make(**options: Any) -> Rounder:
        return Rounder(curvature, blocks, tmp_path / "rounded", **options)

    return make


def weight(model: Any) -> Callable[[str], torch.Tensor]:
    return lambda name: weight_of(model.get_submodule(name))


def stood_for(stored: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    if f"{part}_nf4" in stored:
        return dequantize_nf4(NF4(stored[f"{part}_nf4"], stored[f"{part}_absmax"])).double()
    if f"{part}_int8" in stored:
        return dequantize_int8(Int8(stored[f"{part}_int8"], stored[f"{part}_scale"])).double()
    int4 = Int4(stored[f"{part}_int4"], stored[f"{part}_scale"], stored.get(f"{part}_zero"))
    return dequantize_int4(int4).double()


def test_every_layer_is_rounded_in_its_own_metric(source: Any, rounder: Callable[..., Rounder]) -> None:
    model, curvature, store, plan = source
    parts: dict[str, dict[str, torch.Tensor]] = {}
    rounding = rounder(dense=weight(model))

    def watch(name: str, matrices: dict[str, torch.Tensor], spec: Any) -> dict[str, torch.Tensor]:
        parts[name] = matrices
        return rounding(name, matrices, spec)

    small = compress(deepcopy(model), plan, store, rounding=watch)
    kinds = set()
    for index, block in enumerate(block_linears(model)):
        c, f = curvature.metric(index)
        for name, linear in block.items():
            spec, given, w = plan.layers[name], parts[name], weight_of(linear)
            kinds.add((spec.kind, spec.weights, spec.asymmetric))
            metric = grid_of(spec.precision), c[name], f[name]
            if spec.kind == "dense":
                found = round_dense(w, *metric)
            elif spec.kind == "lowrank":
                found = round_lowrank(w, given["lowrank_u"], given["lowrank_v"], *metric)
            else:
                found = round_pivot(w, *(given[f"pivot_{part}"] for part in ("index", "basis", "coeff")), *metric)
            stored = dict(small.get_submodule(name).state_dict())
            for part, matrix in found.tensors.items():
                own = {"weight": "weight", "u": "lowrank_u", "v": "lowrank_v"}.get(part, f"pivot_{part}")
                assert torch.equal(stood_for(stored, own), decoded(matrix))
    assert len(kinds) == 12


def test_what_was_rounded_is_found_again(source: Any, rounder: Callable[..., Rounder], monkeypatch: Any) -> None:
    model, _, store, plan = source
    first = compress(deepcopy(model), plan, store, rounding=rounder(dense=weight(model))).state_dict()
    for what in ("round_dense", "round_lowrank", "round_pivot"):
        monkeypatch.setattr(f"rankwise.alloc.rounder.{what}", pytest.fail)
    again = compress(deepcopy(model), plan, store, rounding=rounder(dense=weight(model))).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_other_numbers_are_another_layer(source: Any, rounder: Callable[..., Rounder], tmp_path: Path) -> None:
    model, _, _, plan = source
    name = next(name for name, spec in plan if spec.kind == "dense")
    w, spec = weight_of(model.get_submodule(name)), plan.layers[name]
    one = rounder()(name, {"weight": w}, spec)
    other = rounder()(name, {"weight": w.flip(1)}, spec)
    coarse = rounder()(name, {"weight": w}, spec.stored_as(Precision("int4", 128)))
    assert len(list((tmp_path / "rounded").iterdir())) == 3
    codes = next(part for part in one if not part.endswith(("_scale", "_absmax", "_zero")))
    assert not torch.equal(one[codes], other[codes])
    assert coarse["weight_scale"].shape[1] == 2


def test_held_out_inputs_reach_the_guards(
    source: Any, rounder: Callable[..., Rounder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, curvature, store, plan = source
    windows = torch.randint(2, 512, (2, 48), generator=torch.Generator().manual_seed(9))
    held_out = collect(model, windows, windows, tmp_path / "held_out", device=CPU)
    name = next(name for name, spec in plan if spec.kind == "lowrank")
    index = next(at for at, block in enumerate(block_linears(model)) if name in block)
    spec, w = plan.layers[name], weight_of(model.get_submodule(name))
    u, v = store.load(name, spec.rank)
    rounder(dense=weight(model))(name, {"lowrank_u": u, "lowrank_v": v}, spec)
    judged = []
    monkeypatch.setattr(module, "round_lowrank", lambda *given: judged.append(given[-1]) or round_lowrank(*given))
    stored = rounder(dense=weight(model), held_out=held_out)(name, {"lowrank_u": u, "lowrank_v": v}, spec)
    assert len(list((tmp_path / "rounded").iterdir())) == 2  # other text is another layer
    metric = grid_of(spec.precision), *(moments[name] for moments in curvature.metric(index))
    expected = (held_out.inputs(index)[name] + held_out.weighted(index)[name]) / 2
    assert torch.allclose(judged[0], expected, rtol=1e-6)
    found = round_lowrank(w, u, v, *metric, expected)
    for part in ("u", "v"):
        assert torch.equal(stood_for(stored, f"lowrank_{part}"), decoded(found.tensors[part]))


def test_factors_of_something_else_are_repeated_themselves(source: Any, rounder: Callable[..., Rounder]) -> None:
    """Without `dense` the target is the product of what is given; with it, the weight."""
    model, _, store, plan = source
    name = next(name for name, spec in plan if spec.kind == "lowrank")
    spec, w = plan.layers[name], weight_of(model.get_submodule(name)).double()
    u, v = store.load(name, spec.rank)
    u = 1.5 * u  # far from the weight
    near = {}
    for rule, rounding in {"own": rounder(), "dense": rounder(dense=weight(model))}.items():
        stored = rounding(name, {"lowrank_u": u, "lowrank_v": v}, spec)
        found = stood_for(stored, "lowrank_u") @ stood_for(stored, "lowrank_v")
        near[rule] = float((found - u.double() @ v.double()).norm()), float((found - w).norm())
    assert near["own"][0] < near["dense"][0]
    assert near["dense"][1] < near["own"][1]


def test_pivot_layers_keep_the_order_of_their_rows(source: Any, rounder: Callable[..., Rounder]) -> None:
    model, _, store, plan = source
    name = next(name for name, spec in plan if spec.kind == "pivot")
    small = compress(deepcopy(model), plan, store, rounding=rounder())
    layer = small.get_submodule(name)
    u, v = store.load(name, plan.layers[name].rank)
    x = torch.randn(5, v.shape[1], generator=torch.Generator().manual_seed(0))
    exact = x @ (u @ v).T
    assert float((layer(x) - exact).norm()) < 0.4 * float(exact.norm())


def test_errors_name_the_layer(source: Any, rounder: Callable[..., Rounder]) -> None:
    model, _, _, plan = source
    name = next(name for name, spec in plan if spec.kind == "dense")
    broken = weight_of(model.get_submodule(name)).clone()
    broken[3, 5] = float("nan")
    with pytest.raises(RankwiseError, match=rf"^{name}: weight: NaN or Inf"):
        rounder()(name, {"weight": broken}, plan.layers[name])
