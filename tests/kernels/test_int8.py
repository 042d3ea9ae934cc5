"""Products with int8 weights equal the product with the numbers that codes and scales stand for."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import run
from tensors import DEVICE, TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error

from bench.gpu.int8 import works
from rankwise.errors import RankwiseError
from rankwise.kernels import backend, eightbit, quantize_int8
from rankwise.kernels.backend import cdiv
from rankwise.kernels.eightbit import PTX, product, write_out
from rankwise.kernels.int8 import Int8, align_int8, dequantize_int8, int8_linear, int8_lowrank

dtypes = pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)


def random(m: int, n: int, seed: int = 0) -> Int8:
    return quantize_int8(draw(m, n, dtype=torch.float32, seed=seed))


def exact(x: torch.Tensor, w: Int8, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ dequantize_int8(w, torch.float64).T
    return y if bias is None else y + bias.double()


def test_numbers_come_back_within_half_a_step() -> None:
    w = draw(7, 13, dtype=torch.float32)
    w[2] = 0
    stored = quantize_int8(w)
    assert stored.codes.dtype == torch.int8
    assert stored.scale.dtype == torch.bfloat16
    assert stored.scale.shape == (7, 1)
    assert not stored.codes[2].any()
    assert int(stored.codes.abs().max()) <= 127
    step = stored.scale.float()
    assert ((dequantize_int8(stored) - w).abs() <= step * 0.5 + 127 * step / 256).all()  # a scale rounds to 8 bits


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RankwiseError, match="a matrix, not empty"):
        quantize_int8(torch.zeros(shape))


@pytest.mark.parametrize("n", [1, 7, 16, 40])
def test_aligned_rows_are_the_same_matrix(n: int) -> None:
    w = random(5, n)
    aligned = align_int8(w)
    assert torch.equal(aligned.codes, w.codes)
    assert aligned.codes.stride(0) % 16 == 0
    assert (aligned.codes.data_ptr() == w.codes.data_ptr()) == (n % 16 == 0)
    before = dequantize_int8(w)
    for tensor in w:  # as the runtime does with a module whose matrices it has taken
        tensor.data = tensor.data.new_empty(0)
    assert torch.equal(dequantize_int8(aligned), before)


@needs_triton
@dtypes
@pytest.mark.parametrize("tokens", [1, 5, 20, 65])
@pytest.mark.parametrize(("m", "n"), [(43, 128), (1, 300), (33, 7)])
def test_equals_the_product_with_the_numbers(m: int, n: int, tokens: int, dtype: torch.dtype) -> None:
    w, x, bias = random(m, n), draw(tokens, n, dtype=dtype), draw(m, dtype=dtype)
    with in_triton():
        y, aligned = int8_linear(x, w, bias), int8_linear(x, align_int8(w), bias)
    assert y.dtype == dtype
    assert relative_error(y, exact(x, w, bias)) < TOLERANCE[dtype]
    assert relative_error(aligned, exact(x, w, bias)) < TOLERANCE[dtype]


@needs_triton
@settings(max_examples=5, deadline=None)
@given(m=st.integers(1, 50), n=st.integers(1, 600), tokens=st.integers(1, 40))
def test_any_shape(m: int, n: int, tokens: int) -> None:
    w, x = align_int8(random(m, n)), draw(tokens, n, dtype=torch.float32)
    with in_triton():
        assert relative_error(int8_linear(x, w), exact(x, w)) < 1e-5


@needs_triton
@pytest.mark.parametrize("tokens", [1, 17])
def test_long_rows_are_shared(tokens: int) -> None:
    """By several programs, the last of them with less to do."""
    w, x, bias = random(20, 2340), draw(tokens, 2340, dtype=torch.float16), draw(20, dtype=torch.float16)
    with in_triton():
        y = int8_linear(x, align_int8(w), bias)
    assert relative_error(y, exact(x, w, bias)) < TOLERANCE[torch.float16]


@needs_triton
@dtypes
@pytest.mark.parametrize("tokens", [1, 16, 18])
@pytest.mark.parametrize("rank", [7, 48])
def test_lowrank_is_two_products(rank: int, tokens: int, dtype: torch.dtype) -> None:
    v, u = align_int8(random(rank, 1100)), align_int8(random(20, rank, seed=1))
    x, bias = draw(tokens, 1100, dtype=dtype), draw(20, dtype=dtype)
    with in_triton():
        y = int8_lowrank(x, v, u, bias)
    assert relative_error(y, exact(exact(x, v), u, bias)) < TOLERANCE[dtype]


@pytest.mark.skipif(DEVICE == "cpu", reason="launches overlap on a GPU alone")
def test_overlapping_changes_nothing() -> None:
    v, u, x = random(128, 256), random(40, 128, seed=1), draw(3, 256, dtype=torch.bfloat16)
    with in_triton():
        assert torch.equal(int8_lowrank(x, v, u, overlap=True), int8_lowrank(x, v, u))


@needs_triton
def test_leading_dimensions_and_strides() -> None:
    w, x = random(20, 128), draw(3, 128, 2, dtype=torch.float32).transpose(1, 2)
    wide = draw(4, 256, dtype=torch.float32)[:, 3:131]
    with in_triton():
        nested, offset, vector = int8_linear(x, w), int8_linear(wide, w), int8_linear(wide[0], w)
        empty, pair = int8_linear(x[:0], w), int8_lowrank(x[:0], w, random(9, 20))
    assert nested.shape == (3, 2, 20)
    assert empty.shape == (0, 2, 20)
    assert pair.shape == (0, 2, 9)
    assert relative_error(nested, exact(x, w)) < 1e-5
    assert relative_error(offset, exact(wide, w)) < 1e-5
    assert relative_error(vector, exact(wide[0], w)) < 1e-5


@needs_triton
@pytest.mark.parametrize("tokens", [1, 24])
@dtypes
def test_every_code_comes_out_exact(tokens: int, dtype: torch.dtype) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE).view(16, 16)
    w = Int8(codes, torch.full((16, 1), 0.5, dtype=torch.bfloat16, device=DEVICE))
    x = torch.eye(16, dtype=dtype, device=DEVICE)[torch.arange(tokens, device=DEVICE) % 16]
    with in_triton():
        assert torch.equal(int8_linear(x, w), exact(x, w).to(dtype))


@needs_triton
@pytest.mark.parametrize("tokens", [3, 20])
def test_the_number_of_programs_changes_rounding_alone(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that share the columns, the last with fewer of them; of one product, and of a pair's first."""
    v, u = align_int8(random(40, 1500)), align_int8(random(20, 40, seed=1))
    x, bias = draw(tokens, 1500, dtype=torch.float32), draw(40, dtype=torch.float32)
    sizes, whole, pairs = eightbit._sizes, [], []
    for splits in (1, 2, 3, 6):

        def fixed(tokens: int, m: int, width: int, sms: int, n: int = splits) -> tuple[dict[str, int], int]:
            size, _ = sizes(tokens, m, width, sms)
            return size, cdiv(cdiv(width, size["INNER"]), n) * size["INNER"]

        monkeypatch.setattr(eightbit, "_sizes", fixed)
        with in_triton():
            whole.append(int8_linear(x, v, bias))
            pairs.append(int8_lowrank(x, v, u))
    assert relative_error(whole[0], exact(x, v, bias)) < 1e-5
    assert all(relative_error(y, whole[0]) < 1e-6 for y in whole)
    assert all(relative_error(y, pairs[0]) < 1e-6 for y in pairs)


@needs_triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_does_not_touch_its_neighbours(bad: float) -> None:
    v, u, x = align_int8(random(7, 40)), align_int8(random(9, 7)), draw(3, 40, dtype=torch.float32)
    broken = x.clone()
    broken[1] = bad
    with in_triton():
        y, found = int8_lowrank(x, v, u), int8_lowrank(broken, v, u)
    assert torch.equal(y[[0, 2]], found[[0, 2]])
    assert not found[1].isfinite().any()


@needs_triton
@dtypes
def test_written_out_by_a_kernel(dtype: torch.dtype) -> None:
    w = align_int8(random(5, 1030))
    with in_triton():
        assert torch.equal(write_out(*w, dtype), dequantize_int8(w, dtype))


@needs_triton
@pytest.mark.parametrize("tokens", [2, 18])
def test_one_node_for_the_compiler(tokens: int) -> None:
    v, u = random(24, 40), random(20, 24)
    x, bias = draw(tokens, 40, dtype=torch.float16), draw(20, dtype=torch.float16)
    what = ("test_schema", "test_faketensor")
    with in_triton():
        torch.library.opcheck(torch.ops.rankwise.int8_linear, (x, *v, None), test_utils=what)
        if tokens <= 16:
            torch.library.opcheck(torch.ops.rankwise.int8_pair, (x, *v, *u, bias, False), test_utils=what)


@needs_triton
def test_a_wrong_width_is_said() -> None:
    with in_triton(), pytest.raises(RankwiseError, match="128"):
        product(draw(2, 64, dtype=torch.float32), *random(8, 128), None)


@needs_triton
def test_gradients_come_back() -> None:
    w, x = random(8, 24), draw(3, 24, dtype=torch.float32).requires_grad_()
    with in_triton():
        int8_linear(x, w).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, dequantize_int8(w, torch.float64).sum(0).expand(3, -1)) < 1e-5


def test_torch_alone() -> None:
    v, u, x = random(7, 40), random(20, 7), draw(2, 5, 40)
    with backend("torch"):
        assert relative_error(int8_lowrank(x, v, u), exact(exact(x, v), u)) < 1e-12


@pytest.mark.parametrize("dtype", PTX, ids=str)
def test_the_assembly_knows_every_code(dtype: torch.dtype) -> None:
    for first in range(-128, 128, 4):
        codes = list(range(first, first + 4))
        word = sum((code & 255) << 8 * k for k, code in enumerate(codes))
        assert run(PTX[dtype], dtype, {"$2": word}, 2) == codes


@needs_triton
@pytest.mark.parametrize("work", works(m=32, n=128, rank=24, tokens=(1, 20)), ids=lambda work: work.name)
def test_contests_are_fair(work: Any) -> None:
    with in_triton():
        contest = work.build(torch.device(DEVICE))
        assert relative_error(contest.ours(), contest.reference()) < contest.tolerance
        for peer in contest.peers.values():
            assert relative_error(peer(), contest.reference()) < contest.tolerance
