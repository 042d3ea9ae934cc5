"""Rounding to the nearest code: what it stores, how far off it is, and what it refuses."""

import pytest
import torch
from fourbit import PRECISIONS

from rankwise.errors import RankwiseError
from rankwise.kernels import NF4, Int4, Int8
from rankwise.kernels.quantized import dequantize
from rankwise.plan import LayerSpec
from rankwise.quantize import nearest, quantize
from rankwise.storage import Precision


def numbers(precision: Precision, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """What stored tensors stand for, by suffix."""
    kind = {"nf4": NF4, "int4": Int4, "int8": Int8}[precision.weights]
    return dequantize(kind(*parts.values()))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
def test_stored_tensors_are_those_of_the_spec_and_near_the_matrix(kind: str, precision: Precision) -> None:
    m, n, rank = 320, 256, 256 if kind == "dense" else 128
    spec = LayerSpec(kind, m, n, rank, "fp32").stored_as(precision)
    generator = torch.Generator().manual_seed(5)
    matrices = {name: torch.randn(shape, generator=generator) + 0.2 for name, shape in spec.matrices.items()}
    stored = nearest("layer", matrices, spec)
    wanted = {name: t for name, t in spec.tensors.items() if name != "pivot_index"}
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        name: (t.shape, getattr(torch, t.dtype)) for name, t in wanted.items()
    }
    off = (0.003, 0.01) if precision.weights == "int8" else (0.05, 0.13)
    for name, matrix in matrices.items():
        found = numbers(precision, {part.removeprefix(name): t for part, t in stored.items() if part.startswith(name)})
        assert off[0] < float((found - matrix).norm() / matrix.norm()) < off[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_is_refused(value: float) -> None:
    spec = LayerSpec("lowrank", 256, 256, 64, "nf4")
    matrices = {name: torch.zeros(shape) for name, shape in spec.matrices.items()}
    matrices["lowrank_u"][3, 4] = value
    with pytest.raises(RankwiseError, match=r"^a\.b\.lowrank_u: NaN or Inf; finite numbers are needed$"):
        nearest("a.b", matrices, spec)


def test_zeros_stay_zeros() -> None:
    for precision in PRECISIONS:
        spec = LayerSpec("dense", 2, 128, 2).stored_as(precision)
        assert not numbers(precision, quantize(torch.zeros(2, 128), spec)).any()
