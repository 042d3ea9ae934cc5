"""Weights in 4 and 8 bits from plan to checkpoint, transformers and back: nothing is lost or cast, bytes as planned."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from fourbit import PRECISIONS, in_turn, random_layer, wide_model
from safetensors.torch import load_file, save_file
from tensors import DEVICE, needs_triton
from torch import nn
from transformers import AutoModelForCausalLM

import rankwise
from rankwise import files, pipeline
from rankwise.engine.checkpoint import config_entry, open_checkpoint, save, verify
from rankwise.engine.layers import CompressedLinear, PivotLinear, QuantisedLinear, tensor_shapes
from rankwise.engine.matrices import dequantised
from rankwise.errors import RankwiseError
from rankwise.kernels import backend
from rankwise.pipeline import round_layers
from rankwise.plan import LayerSpec, RankPlan
from rankwise.storage import Precision

WINDOWS = torch.randint(2, 512, (4, 24), generator=torch.Generator().manual_seed(3))
FIXED = ("_nf4", "_absmax", "_int4", "_int8", "_scale", "_zero", "pivot_index")
MIXTURE = [PRECISIONS[0], Precision("fp32"), *(Precision("int4", *more) for more in ((32, True), (64,)))]
MIXTURE += [Precision("int8")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RankPlan]:
    """A dense model, and a plan with its factors."""
    model = wide_model()
    work = tmp_path_factory.mktemp("factors")
    return model, rankwise.allocate(model, WINDOWS, rankwise.Uniform(0.5, rank_multiple=32), work=work)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def made(source: tuple[Any, RankPlan], precisions: list[Precision], out: Path) -> tuple[RankPlan, Any]:
    model, plan = source
    plan = in_turn(plan, precisions)
    small = rankwise.compress(deepcopy(model), plan)
    plan.other_bytes = pipeline.tensor_bytes(small) - plan.bytes
    save(small, None, plan, out)
    return plan, small


def written_out(layer: CompressedLinear) -> torch.Tensor:
    """The matrix `[m, n]` that a layer stands for, from its stored numbers."""
    found = [dequantised(layer.matrix(name), torch.float32) for name in layer.matrices]
    if len(found) == 1:
        return found[0]
    first, second = found
    if not isinstance(layer, PivotLinear):
        return second @ first
    return torch.cat([first, second @ first])[layer.pivot_index.long()]


def dense_twin(small: Any) -> Any:
    """The model with dense weights in the place of its compressed layers."""
    twin = wide_model()
    for name, layer in small.named_modules():
        if isinstance(layer, CompressedLinear):
            twin.get_submodule(name).weight.copy_(written_out(layer))
    return twin


@pytest.mark.parametrize("precisions", [*([p] for p in PRECISIONS), MIXTURE], ids=[*map(str, PRECISIONS), "mixture"])
def test_round_trip(precisions: list[Precision], source: tuple[Any, RankPlan], tmp_path: Path) -> None:
    plan, small = made(source, precisions, tmp_path / "one")
    logits = small(WINDOWS).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(loaded(WINDOWS).logits, logits)
    loaded.save_pretrained(tmp_path / "two")
    assert same(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    torch.testing.assert_close(dense_twin(small)(WINDOWS).logits, logits, rtol=1e-3, atol=1e-3)
    for name, spec in plan.compressed.items():
        layer = loaded.get_submodule(name)
        assert isinstance(layer, CompressedLinear)
        assert layer.precision == spec.precision
    path = tmp_path / "one" / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == plan.total_bytes
    assert open_checkpoint(tmp_path / "one")[0] == plan
    assert verify(tmp_path / "one") >= 5
    again, _ = open_checkpoint(tmp_path / "two")
    assert {n: config_entry(s) for n, s in again} == {n: config_entry(s) for n, s in plan.compressed.items()}


@pytest.fixture(scope="module")
def mixture(source: tuple[Any, RankPlan], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RankPlan, Any]:
    folder = tmp_path_factory.mktemp("mixture") / "small"
    return folder, *made(source, MIXTURE, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_dtype_touches_what_is_stored_in_4_bits(dtype: torch.dtype, mixture: tuple[Path, RankPlan, Any]) -> None:
    """Neither loading in another dtype nor casting a model that is loaded."""
    folder = mixture[0]
    stored = {name: t for name, t in tensors(folder).items() if name.endswith(FIXED)}
    assert {t.dtype for t in stored.values()} == {torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.int32}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert same({name: loaded.state_dict()[name] for name in stored}, stored)
    cast = loaded.to(torch.float16).to(torch.float32).bfloat16().to(dtype)
    assert same({name: cast.state_dict()[name] for name in stored}, stored)
    assert cast.model.layers[0].self_attn.q_proj.weight.dtype == dtype
    assert cast(WINDOWS).logits.dtype == dtype


def test_config_and_card_say_what_is_stored(mixture: tuple[Path, RankPlan, Any]) -> None:
    folder, plan, _ = mixture
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    assert layers.keys() == plan.compressed.keys()
    entries = list(layers.values())
    for weights in ("nf4", "int8"):
        assert {"dense", "lowrank", "pivot"} >= {e["kind"] for e in entries if e["weights"] == weights} > set()
    assert all(("group" in e) == (e["weights"] == "int4") for e in entries)
    assert any(e.get("asymmetric") for e in entries)
    assert all(e.get("asymmetric", True) for e in entries)
    stored = "Stored as fp32; int4 by 32, asymmetric; int4 by 64; int8; nf4."
    assert stored in (folder / "README.md").read_text()


DAMAGE: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "missing": ("_nf4", lambda t: None, "missing"),
    "transposed": ("weight_nf4", lambda t: t.T.contiguous(), "the plan says shape"),
    "scales": ("_scale", lambda t: t[:, :1].clone(), "the plan says shape"),
    "dtype-of-scales": ("_scale", lambda t: t.float(), "F32; the plan says BF16"),
    "dtype-of-absmax": ("_absmax", lambda t: t.bfloat16(), "BF16; the plan says F32"),
    "dtype-of-int8": ("_int8", lambda t: t.view(torch.uint8), "U8; the plan says I8"),
    "dtype-of-codes": ("_int4", lambda t: t.to(torch.int8), "I8; the plan says U8"),
}


@pytest.mark.parametrize(("ending", "change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(
    ending: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    message: str,
    mixture: tuple[Path, RankPlan, Any],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(mixture[0], tmp_path / "copy"))
    stored = tensors(folder)
    name = min(name for name in stored if name.endswith(ending))
    damaged = change(stored.pop(name))
    stored |= {} if damaged is None else {name: damaged}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (open_checkpoint, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(RankwiseError, match=message) as raised:
            load(folder)
        assert raised.value.field == name


def test_zero_points_are_verified(mixture: tuple[Path, RankPlan, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixture[0], tmp_path / "copy"))
    stored = tensors(folder)
    name = min(name for name in stored if name.endswith("_zero"))
    stored[name][0, 0] = 16
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    digest = files.sha256(folder / "model.safetensors")
    lines = [f"{digest}  model.safetensors\n" if "safetensors" in line else line for line in lines]
    (folder / "SHA256SUMS").write_text("".join(lines))
    with pytest.raises(RankwiseError, match="zero points above 15") as raised:
        verify(folder)
    assert raised.value.field == name


def test_dense_weights_alone_need_no_factors(tmp_path: Path) -> None:
    """And one layer is enough to make transformers without rankwise stop: the guard has the wrong shape."""
    model = wide_model()
    shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in n}
    plan = RankPlan({n: LayerSpec("dense", *shape, min(shape), "fp32") for n, shape in shapes.items()})
    first = next(iter(plan.layers))
    plan.layers[first] = plan.layers[first].stored_as(Precision("nf4"))
    small = rankwise.compress(model, plan)
    assert type(small.get_submodule(first)) is QuantisedLinear
    assert small.get_submodule(first).weight.shape == (1,)
    small.save_pretrained(tmp_path / "out")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(WINDOWS).logits, small(WINDOWS).logits)


def test_factored_layers_need_them(source: tuple[Any, RankPlan]) -> None:
    plan = in_turn(source[1], MIXTURE)
    plan.factors = None
    with pytest.raises(RankwiseError, match="a plan read from JSON needs the factors"):
        rankwise.compress(wide_model(), plan)


def test_rounding_later_is_rounding_at_once(source: tuple[Any, RankPlan]) -> None:
    """In fp32 nothing is lost in between."""
    model, plan = source
    plan = in_turn(plan, MIXTURE)
    once = rankwise.compress(deepcopy(model), plan)
    later = rankwise.compress(deepcopy(model), plan.stored_as(Precision("fp32")))
    assert not any(name.endswith("_int4") for name in later.state_dict())
    round_layers(later, plan)
    assert same(dict(once.state_dict()), dict(later.state_dict()))
    assert later.config.quantization_config.layers == once.config.quantization_config.layers


def test_another_rounding_gets_whole_layers(source: tuple[Any, RankPlan]) -> None:
    model, plan = source
    plan, seen = in_turn(plan, MIXTURE), {}

    def zeros(name: str, matrices: dict[str, torch.Tensor], spec: LayerSpec) -> dict[str, torch.Tensor]:
        seen[name] = {part: tuple(matrix.shape) for part, matrix in matrices.items()}
        return {part: torch.zeros(()) for part in spec.tensors if part != "pivot_index"}

    small = rankwise.compress(deepcopy(model), plan, rounding=zeros)
    pivots = {name: {"pivot_index": (spec.out_features,)} for name, spec in plan if spec.kind == "pivot"}
    assert seen == {name: spec.matrices | pivots.get(name, {}) for name, spec in plan if spec.quantised}
    assert not any(t.any() for name, t in small.state_dict().items() if name.endswith("_absmax"))


SPECS = [
    LayerSpec("dense", 96, 128, 96).stored_as(Precision("nf4")),
    LayerSpec("lowrank", 192, 128, 64).stored_as(Precision("nf4")),
    LayerSpec("pivot", 96, 128, 64).stored_as(Precision("int4", 32, True)),
    LayerSpec("lowrank", 100, 64, 32).stored_as(Precision("int4", 32)),
    LayerSpec("pivot", 70, 128, 64).stored_as(Precision("nf4")),
    LayerSpec("dense", 33, 7, 7).stored_as(Precision("int8")),
    LayerSpec("lowrank", 50, 41, 7).stored_as(Precision("int8")),
    LayerSpec("pivot", 33, 41, 7).stored_as(Precision("int8")),
]
LAYERS = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.precision}")


def filled(spec: LayerSpec, bias: bool = True, dtype: torch.dtype = torch.float32) -> CompressedLinear:
    """A layer of random codes; a pivot layer's rows in random order."""
    return random_layer(spec, bias, dtype, torch.Generator().manual_seed(7))


@LAYERS
def test_a_layer_is_its_matrix_times_x(spec: LayerSpec) -> None:
    layer = filled(spec)
    x = torch.randn(2, 3, spec.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ written_out(layer).T + layer.bias, rtol=1e-4, atol=1e-4)
    target = torch.randn_like(y)
    (y * target).sum().backward()
    torch.testing.assert_close(x.grad, target @ written_out(layer), rtol=1e-4, atol=1e-3)
    state = layer.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items() if n != "bias"} == tensor_shapes(spec)
    counted = [t for n, t in state.items() if n not in ("weight", "bias")]
    assert sum(t.numel() * t.element_size() for t in counted) == spec.bytes
    assert str(spec.precision) in repr(layer)


@needs_triton
@LAYERS
def test_a_layer_runs_by_the_kernels_where_they_run(spec: LayerSpec) -> None:
    layer = filled(spec).to(DEVICE)
    x = torch.randn(3, spec.in_features, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with backend("triton"):
        y = layer(x)
        assert len(layer._repacked) == len(layer.matrices)
        torch.testing.assert_close(y, x @ written_out(layer).T + layer.bias, rtol=1e-3, atol=1e-3)
        layer.load_state_dict({name: torch.zeros_like(t) for name, t in layer.state_dict().items()})
        assert not layer._repacked
        if not isinstance(layer, PivotLinear):
            assert not layer(x).any()
    assert layer.half()._repacked == {}
