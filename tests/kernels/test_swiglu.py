"""Gated activations equal their formulas in fp64."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tensors import DEVICE, TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error

from rankwise.errors import RankwiseError
from rankwise.kernels.swiglu import geglu, swiglu

SHAPES = [(5, 64), (3, 1100), (1, 1), (2, 3, 33), (0, 8), (4,)]
BACKENDS = [
    *(pytest.param(dtype, None, id=f"torch-{dtype}".replace("torch.", "")) for dtype in TOLERANCE),
    *(pytest.param(d, "triton", id=f"triton-{d}".replace("torch.", ""), marks=needs_triton) for d in TRITON_DTYPES),
]


def running(backend: str | None) -> Any:
    return in_triton() if backend else nullcontext()


def exact(kind: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    x = gate.double()
    if kind is swiglu:
        return x / (1 + (-x).exp()) * up.double()
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) * up.double()


@pytest.mark.parametrize("kind", [swiglu, geglu])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_equals_the_formula(dtype: torch.dtype, backend: str | None, shape: tuple[int, ...], kind: Any) -> None:
    gate, up = 3 * draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    with running(backend):
        y = kind(gate, up)
    assert y.dtype == dtype
    assert y.shape == gate.shape
    assert relative_error(y, exact(kind, gate, up)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", [swiglu, geglu])
@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=needs_triton)])
def test_halves_of_a_packed_projection(backend: str | None, kind: Any) -> None:
    gate, up = draw(6, 2 * 40, dtype=torch.float32).chunk(2, -1)
    turned = draw(40, 6, dtype=torch.float32).T
    with running(backend):
        assert relative_error(kind(gate, up), exact(kind, gate, up)) <= 1e-5
        assert relative_error(kind(gate, turned), exact(kind, gate, turned)) <= 1e-5


@pytest.mark.parametrize("kind", [swiglu, geglu])
@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=needs_triton)])
def test_far_from_zero_it_is_the_identity_or_zero(backend: str | None, kind: Any) -> None:
    gate = torch.tensor([[1e4, 300.0, 0.0, -300.0, -1e4]], device=DEVICE)
    with running(backend):
        y = kind(gate, torch.full_like(gate, 2.0))
    assert y[0].tolist() == pytest.approx([2e4, 600.0, 0.0, 0.0, 0.0], rel=1e-6)


@needs_triton
def test_the_operation_keeps_its_promises_to_the_compiler() -> None:
    gate, up = draw(6, 2 * 8, dtype=torch.float32).chunk(2, -1)
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.rankwise.gated_activation, (gate, up, True), test_utils=checks)


def test_shapes_must_agree() -> None:
    with pytest.raises(RankwiseError, match="up"):
        swiglu(draw(2, 3), draw(2, 4))
    with pytest.raises(RankwiseError, match="up"):
        geglu(draw(2, 3), draw(2, 3, dtype=torch.float32))
