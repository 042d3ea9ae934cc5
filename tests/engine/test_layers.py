"""Compressed layers against the matrices they stand for, and against the plan's arithmetic."""

import copy

import pytest
import torch

from rankwise.engine.layers import CompressedLinear, LowRankLinear, PivotLinear, build_layer, tensor_shapes
from rankwise.plan import LayerSpec

SPECS = [
    LayerSpec("lowrank", 12, 20, 5, "fp32"),
    LayerSpec("lowrank", 20, 12, 1, "fp32"),
    LayerSpec("pivot", 12, 20, 5, "fp32"),
    LayerSpec("pivot", 20, 12, 11, "fp32"),
    LayerSpec("pivot", 9, 9, 1, "fp32"),
]
BIASES = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
LAYERS = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.out_features}x{s.in_features}-rank{s.rank}")


def filled(spec: LayerSpec, bias: bool, dtype: torch.dtype = torch.float32) -> CompressedLinear:
    """A layer of random numbers; a pivot layer's rows in random order."""
    generator = torch.Generator().manual_seed(7)
    layer = build_layer(spec, bias, dtype, "cpu")
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if isinstance(layer, PivotLinear):
        layer.pivot_index.copy_(torch.randperm(spec.out_features, generator=generator).int())
    return layer


def matrix_of(layer: CompressedLinear) -> torch.Tensor:
    """The `[m, n]` matrix that a layer stands for, in fp64 and row by row."""
    if isinstance(layer, LowRankLinear):
        return layer.lowrank_u.double() @ layer.lowrank_v.double()
    assert isinstance(layer, PivotLinear)
    basis, coeff = layer.pivot_basis.double(), layer.pivot_coeff.double()
    rows = []
    for place in layer.pivot_index.tolist():
        if place < len(basis):
            rows.append(basis[place])
        else:
            rows.append(sum(c * b for c, b in zip(coeff[place - len(basis)], basis, strict=True)))
    return torch.stack(rows)


@LAYERS
@BIASES
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)], ids=str)
def test_forward_is_the_matrix_times_x(spec: LayerSpec, bias: bool, shape: tuple[int, ...]) -> None:
    layer = filled(spec, bias)
    x = torch.randn(*shape, spec.in_features, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ matrix_of(layer).T
    if layer.bias is not None:
        expected = expected + layer.bias.double()
    assert torch.linalg.matrix_rank(matrix_of(layer)) == spec.rank
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@LAYERS
@BIASES
def test_tensors_are_those_that_the_plan_counts(spec: LayerSpec, bias: bool) -> None:
    state = build_layer(spec, bias, torch.float32, "cpu").state_dict()
    expected = tensor_shapes(spec) | ({"bias": (spec.out_features,)} if bias else {})
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    factors = {name: t for name, t in state.items() if name not in ("weight", "bias", "pivot_index")}
    assert sum(t.numel() for t in factors.values()) == spec.parameters
    counted = [t for name, t in state.items() if name not in ("weight", "bias")]
    assert sum(t.numel() * t.element_size() for t in counted) == spec.bytes


def test_a_dense_layer_is_one_weight() -> None:
    assert tensor_shapes(LayerSpec("dense", 6, 4, 4)) == {"weight": (6, 4)}


@LAYERS
def test_the_guard_weighs_nothing(spec: LayerSpec) -> None:
    layer = filled(spec, bias=True)
    x = torch.randn(2, spec.in_features, generator=torch.Generator().manual_seed(2))
    before = layer(x)
    layer.weight.fill_(float("nan"))
    assert torch.equal(layer(x), before)
    assert layer.weight.numel() == 1
    assert layer.weight.dtype == torch.float32  # code asks a linear layer for these
    assert layer.weight.device == torch.device("cpu")


@LAYERS
def test_frozen_and_described(spec: LayerSpec) -> None:
    layer = build_layer(spec, False, torch.bfloat16, "cpu")
    assert not any(p.requires_grad for p in layer.parameters())
    assert f"out={spec.out_features}" in repr(layer)
    assert f"in={spec.in_features}" in repr(layer)
    assert f"rank={spec.rank}" in repr(layer)
    assert all(p.dtype == torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_pivot_index_stays_a_number_of_rows(dtype: torch.dtype) -> None:
    layer = filled(LayerSpec("pivot", 300, 320, 40, "fp32"), bias=False)  # 299 is no bf16 number
    assert isinstance(layer, PivotLinear)
    index = layer.pivot_index.clone()
    layer.to(dtype)
    assert layer.pivot_basis.dtype == dtype
    assert layer.pivot_index.dtype == torch.int32
    assert torch.equal(layer.pivot_index, index)


def test_a_fresh_pivot_index_is_in_order() -> None:
    layer = build_layer(LayerSpec("pivot", 6, 8, 2), False, torch.float32, "cpu")
    assert layer.state_dict()["pivot_index"].tolist() == [0, 1, 2, 3, 4, 5]


@LAYERS
@BIASES
def test_empty_layer_takes_the_tensors_of_another(spec: LayerSpec, bias: bool) -> None:
    source = filled(spec, bias)
    empty = build_layer(spec, bias, torch.float32, torch.device("meta"))
    assert all(t.is_meta for t in empty.state_dict().values())
    empty.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(4, spec.in_features, generator=torch.Generator().manual_seed(5))
    assert torch.equal(empty(x), source(x))
    assert torch.equal(copy.deepcopy(source)(x), source(x))


@pytest.mark.parametrize("kind", ["lowrank", "pivot"])
def test_gradients_flow_to_the_input_alone(kind: str) -> None:
    layer = filled(LayerSpec(kind, 10, 8, 3, "fp32"), bias=True)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    target = torch.randn(5, 10, generator=torch.Generator().manual_seed(6))
    (layer(x) * target).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), target.double() @ matrix_of(layer), rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in layer.parameters())
