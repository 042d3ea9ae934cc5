"""A weight in oneDNN's order gives the products of the weight itself, as exactly as the weight in rows does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import draw, relative_error
from torch.nn.functional import linear

from rankwise.kernels import Dense, LowRank, Pivot, pack, packed_linear
from rankwise.kernels.host import host_linear, prepare
from rankwise.kernels.pack import prepared

BF16 = torch.bfloat16


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 70), st.booleans())
def test_products_are_as_exact_as_those_of_the_weight_in_rows(m: int, n: int, tokens: int, biased: bool) -> None:
    weight, x = draw(m, n, dtype=BF16).cpu(), draw(tokens, n, dtype=BF16).cpu()
    bias = draw(m, dtype=BF16).cpu() if biased else None
    same(host_linear(x, prepare(weight), bias), x, weight, bias)


def same(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Sums in fp32, rounded to bf16 once: half a unit in the last place of each result."""
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (y.dtype, y.shape) == (BF16, exact.shape)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)


def test_inputs_with_strides_and_more_dimensions() -> None:
    weight, wide = draw(70, 40, dtype=BF16).cpu(), draw(2, 3, 80, dtype=BF16).cpu()
    for x in (wide[..., :40], wide[..., 40:], wide[:, 1, :40]):
        same(host_linear(x, prepare(weight)), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    weight = draw(64, 64, dtype=dtype).cpu()
    assert prepare(weight) is weight


def test_a_prepared_group_is_the_group() -> None:
    index = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    basis, coeff = draw(40, 64, dtype=BF16).cpu(), draw(10, 40, dtype=BF16).cpu()
    low = LowRank(draw(24, 64, dtype=BF16).cpu(), draw(70, 24, dtype=BF16).cpu())
    members = [Dense(draw(60, 64, dtype=BF16).cpu()), low, Pivot(index, basis, coeff)]
    x = draw(5, 64, dtype=BF16).cpu()
    for some in (members, members[:1], members[1:2]):
        group = pack(some)
        assert relative_error(packed_linear(x, prepared(group)), packed_linear(x, group)) < 5e-3
        assert prepared(group).first.is_mkldnn or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    exact = x.double() @ (low.u.double() @ low.v.double()).T
    assert relative_error(packed_linear(x, prepared(pack([low]))), exact) < 2e-2
