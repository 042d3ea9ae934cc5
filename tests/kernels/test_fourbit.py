"""Products with 4-bit weights equal the product with the numbers that the weights stand for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE, TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error

from bench.gpu.fourbit import works
from rankwise.errors import RankwiseError
from rankwise.kernels import fourbit
from rankwise.kernels.fourbit import product
from rankwise.kernels.fragments import Fragments, unpack
from rankwise.kernels.int4 import (
    Int4,
    dequantize_int4,
    int4_linear,
    int4_lowrank,
    quantize_int4,
    repack_int4,
    unpack_int4,
)
from rankwise.kernels.nf4 import dequantize_nf4, nf4_linear, nf4_lowrank, quantize_nf4, repack_nf4, unpack_nf4


@dataclass(frozen=True)
class Kind:
    """A format, and one way of making it."""

    pack: Callable[[torch.Tensor], Fragments]
    linear: Callable[..., torch.Tensor]
    lowrank: Callable[..., torch.Tensor]
    dequantize: Callable[..., torch.Tensor]


def int4(group: int, symmetric: bool) -> Kind:
    def pack(w: torch.Tensor) -> Fragments:
        return repack_int4(quantize_int4(w, group, symmetric))

    return Kind(pack, int4_linear, int4_lowrank, dequantize_int4)


KINDS = {
    "int4-32": int4(32, True),
    "int4-64": int4(64, True),
    "int4-128-asymmetric": int4(128, False),
    "nf4": Kind(lambda w: repack_nf4(quantize_nf4(w)), nf4_linear, nf4_lowrank, dequantize_nf4),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
dtypes = pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)


def random(kind: Kind, m: int, n: int, seed: int = 0) -> Fragments:
    return kind.pack(draw(m, n, dtype=torch.float32, seed=seed))


def exact(kind: Kind, x: torch.Tensor, w: Fragments, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ kind.dequantize(w, torch.float64).T
    return y if bias is None else y + bias.double()


@needs_triton
@kinds
@dtypes
@pytest.mark.parametrize("tokens", [1, 5, 11, 20, 65])
def test_equals_the_product_with_the_numbers(kind: Kind, dtype: torch.dtype, tokens: int) -> None:
    w, x, bias = random(kind, 43, 128), draw(tokens, 128, dtype=dtype), draw(43, dtype=dtype)
    with in_triton():
        y = kind.linear(x, w, bias)
    assert y.dtype == dtype
    assert relative_error(y, exact(kind, x, w, bias)) < TOLERANCE[dtype]


@needs_triton
@kinds
@settings(max_examples=4, deadline=None)
@given(m=st.integers(1, 50), blocks=st.integers(1, 3), tokens=st.integers(1, 40))
def test_any_shape(kind: Kind, m: int, blocks: int, tokens: int) -> None:
    w, x = random(kind, m, 128 * blocks), draw(tokens, 128 * blocks, dtype=torch.float32)
    with in_triton():
        y = kind.linear(x, w)
    assert relative_error(y, exact(kind, x, w)) < 1e-5


@needs_triton
@pytest.mark.parametrize("kind", [KINDS["int4-64"], KINDS["nf4"]], ids=["int4", "nf4"])
@pytest.mark.parametrize(("n", "tokens"), [(2304, 1), (1600, 17)])
def test_long_rows_are_shared(kind: Kind, n: int, tokens: int) -> None:
    """By two rounds of the loop; above 16 tokens by several programs, the last of them with nothing to do."""
    w, x, bias = random(kind, 20, n), draw(tokens, n, dtype=torch.float16), draw(20, dtype=torch.float16)
    with in_triton():
        y = kind.linear(x, w, bias)
    assert relative_error(y, exact(kind, x, w, bias)) < TOLERANCE[torch.float16]


@needs_triton
@kinds
@dtypes
def test_leading_dimensions_and_strides(kind: Kind, dtype: torch.dtype) -> None:
    w = random(kind, 20, 128)
    x = draw(3, 128, 2, dtype=dtype).transpose(1, 2)
    wide = draw(4, 256, dtype=dtype)[:, 3:131]
    with in_triton():
        nested, offset, vector = kind.linear(x, w), kind.linear(wide, w), kind.linear(wide[0], w)
        empty = kind.linear(x[:0], w)
    assert nested.shape == (3, 2, 20)
    assert vector.shape == (20,)
    assert empty.shape == (0, 2, 20)
    assert relative_error(nested, exact(kind, x, w)) < TOLERANCE[dtype]
    assert relative_error(offset, exact(kind, wide, w)) < TOLERANCE[dtype]
    assert relative_error(vector, exact(kind, wide[0], w)) < TOLERANCE[dtype]


@needs_triton
@kinds
@dtypes
@pytest.mark.parametrize("tokens", [2, 16, 18])
def test_lowrank_is_two_products(kind: Kind, dtype: torch.dtype, tokens: int) -> None:
    v, u = random(kind, 128, 256), random(kind, 20, 128, seed=1)
    x, bias = draw(tokens, 256, dtype=dtype), draw(20, dtype=dtype)
    with in_triton():
        y = kind.lowrank(x, v, u, bias)
    assert relative_error(y, exact(kind, exact(kind, x, v), u, bias)) < TOLERANCE[dtype]


@pytest.mark.skipif(DEVICE == "cpu", reason="launches overlap on a GPU alone")
@kinds
def test_overlapping_changes_nothing(kind: Kind) -> None:
    v, u, x = random(kind, 128, 256), random(kind, 40, 128, seed=1), draw(3, 256, dtype=torch.bfloat16)
    with in_triton():
        assert torch.equal(kind.lowrank(x, v, u, overlap=True), kind.lowrank(x, v, u))


@needs_triton
@kinds
@pytest.mark.parametrize("tokens", [2, 20])
def test_one_hot_inputs_read_columns(kind: Kind, tokens: int) -> None:
    w = random(kind, 33, 128)
    columns = torch.arange(tokens, device=DEVICE) * 6 + 1
    x = torch.eye(128, device=DEVICE)[columns]
    with in_triton():
        y = kind.linear(x, w)
    assert torch.equal(y, kind.dequantize(w).T[columns])


@needs_triton
@pytest.mark.parametrize("tokens", [1, 9, 24])
@dtypes
def test_small_integers_come_out_exact(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    codes = torch.randint(0, 256, (24, 64), generator=generator, dtype=torch.uint8).to(DEVICE)
    w = repack_int4(Int4(codes, torch.full((24, 2), 0.5, dtype=torch.bfloat16, device=DEVICE)))
    x = torch.randint(-2, 3, (tokens, 128), generator=generator).to(DEVICE, dtype)
    with in_triton():
        y = int4_linear(x, w)
    assert torch.equal(y, exact(KINDS["int4-64"], x, w).to(dtype))  # exact sums, rounded once


@needs_triton
@kinds
@pytest.mark.parametrize("tokens", [3, 20])
def test_the_number_of_programs_changes_rounding_alone(
    kind: Kind, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that share the columns, the last with fewer of them, or none; of one product, and of a pair's first."""
    v, u = random(kind, 128, 1408), random(kind, 20, 128, seed=1)
    x, bias = draw(tokens, 1408, dtype=torch.float32), draw(128, dtype=torch.float32)
    sizes, whole, pairs = fourbit._sizes, [], []
    for splits in (1, 2, 3, 5):

        def fixed(tokens: int, w: Fragments, *more: Any, n: int = splits) -> tuple[dict[str, int], int]:
            return sizes(tokens, w, *more)[0], n if w.n == 1408 else 1

        monkeypatch.setattr(fourbit, "_sizes", fixed)
        with in_triton():
            whole.append(kind.linear(x, v, bias))
            pairs.append(kind.lowrank(x, v, u))
    assert relative_error(whole[0], exact(kind, x, v, bias)) < 1e-5
    assert all(relative_error(y, whole[0]) < 1e-6 for y in whole)
    assert all(relative_error(y, pairs[0]) < 1e-6 for y in pairs)


@needs_triton
@kinds
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_come_back(kind: Kind, compiled: bool) -> None:
    v, u = random(kind, 128, 256), random(kind, 20, 128, seed=1)
    x, bias = draw(3, 256, dtype=torch.float32).requires_grad_(), torch.zeros(20, device=DEVICE, requires_grad=True)

    def loss(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return kind.lowrank(x, v, u, bias).sum()

    with in_triton():
        (torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss)(x, bias).backward()
    weight = kind.dequantize(u, torch.float64) @ kind.dequantize(v, torch.float64)
    assert x.grad is not None
    assert bias.grad is not None
    assert relative_error(x.grad, weight.sum(0).expand(3, -1)) < 1e-5
    assert torch.equal(bias.grad, torch.full((20,), 3.0, device=DEVICE))


@needs_triton
@kinds
def test_a_token_does_not_touch_its_neighbours(kind: Kind) -> None:
    w, x = random(kind, 16, 128), draw(3, 128, dtype=torch.float32)
    broken = x.clone()
    broken[1] = float("nan")
    with in_triton():
        y, found = kind.linear(x, w), kind.linear(broken, w)
    assert torch.equal(y[[0, 2]], found[[0, 2]])
    assert found[1].isnan().all()


@needs_triton
@kinds
@dtypes
def test_unpacked_by_a_kernel(kind: Kind, dtype: torch.dtype) -> None:
    w = random(kind, 21, 384)
    with in_triton():
        numbers = unpack(w, dtype)
    exactly = dtype == torch.float32
    assert relative_error(numbers, kind.dequantize(w, torch.float64)) < (1e-7 if exactly else TOLERANCE[dtype])


@needs_triton
@pytest.mark.parametrize("tokens", [2, 18])
def test_one_node_for_the_compiler(tokens: int) -> None:
    v, u = random(KINDS["int4-64"], 64, 128), random(KINDS["int4-64"], 20, 64)
    x, bias = draw(tokens, 128, dtype=torch.float16), draw(20, dtype=torch.float16)
    what = ("test_schema", "test_faketensor")
    with in_triton():
        torch.library.opcheck(torch.ops.rankwise.fourbit_linear, (x, *v, None), test_utils=what)
        if tokens <= 16:
            torch.library.opcheck(torch.ops.rankwise.fourbit_pair, (x, *v[:5], *u, bias, False), test_utils=what)


@needs_triton
def test_a_wrong_width_is_said() -> None:
    with in_triton(), pytest.raises(RankwiseError, match="128"):
        product(draw(2, 64, dtype=torch.float32), random(KINDS["nf4"], 8, 128), None)


@kinds
def test_torch_in_either_order(kind: Kind) -> None:
    w, x = random(kind, 24, 128), draw(2, 5, 128)
    stored = unpack_nf4(w) if w.name == "nf4" else unpack_int4(w)
    assert relative_error(kind.linear(x, w), exact(kind, x, w)) < 1e-12
    assert torch.equal(kind.linear(x, stored), kind.linear(x, w))


@needs_triton
@pytest.mark.parametrize("work", works(m=32, n=128, rank=128, tokens=(1, 20)), ids=lambda work: work.name)
def test_contests_are_fair(work: Any) -> None:
    with in_triton():
        contest = work.build(torch.device(DEVICE))
        assert relative_error(contest.ours(), contest.reference()) < contest.tolerance
        for name, peer in contest.peers.items():  # bitsandbytes rounds to its own grid
            assert name.startswith("bitsandbytes") or relative_error(peer(), contest.reference()) < contest.tolerance
