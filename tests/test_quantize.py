"""Rounding to the nearest code: what it stores, how far off it is, and what it refuses."""

import pytest
import torch
from fourbit import PRECISIONS

from rankwise.errors import RankwiseError
from rankwise.kernels import NF4, Int4
from rankwise.kernels.int4 import dequantize_int4
from rankwise.kernels.nf4 import dequantize_nf4
from rankwise.plan import LayerSpec
from rankwise.quantize import nearest, quantize
from rankwise.storage import Precision


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
    for name, matrix in matrices.items():
        if precision.weights == "nf4":
            found = dequantize_nf4(NF4(stored[f"{name}_nf4"], stored[f"{name}_absmax"]))
        else:
            parts = stored[f"{name}_int4"], stored[f"{name}_scale"], stored.get(f"{name}_zero")
            found = dequantize_int4(Int4(*parts))
        assert 0.05 < float((found - matrix).norm() / matrix.norm()) < 0.13


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
        parts = list(quantize(torch.zeros(2, 128), spec).values())
        found = dequantize_nf4(NF4(*parts)) if precision.weights == "nf4" else dequantize_int4(Int4(*parts))
        assert not found.any()
