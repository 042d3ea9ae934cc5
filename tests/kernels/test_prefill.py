"""Prefill over pages equals attention in fp64, and its chunks make no difference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Pages, exact, paged
from tensors import (
    BACKENDS,
    DEVICE,
    TOLERANCE,
    TRITON_DTYPES,
    draw,
    in_triton,
    needs_triton,
    relative_error,
    running,
    summed_in_order,
)

from rankwise.kernels.attention import decode_attention
from rankwise.kernels.prefill import prefill_attention

# Contexts with their new tokens: one token, padding, a chunk behind a prefix, a whole prompt, no token.
CONTEXTS, NEW = [1, 0, 40, 37, 70, 9], [1, 2, 7, 37, 33, 0]
# heads, kv_heads, head_dim, block, window, soft-cap
SHAPES = {
    "gqa": (8, 2, 64, 16, None, None),
    "no shared heads": (2, 2, 80, 16, None, None),
    "group of 7": (7, 1, 96, 8, None, None),
    "window shorter than a block": (4, 2, 32, 16, 5, None),
    "window of one": (4, 2, 32, 4, 1, None),
    "window": (6, 2, 16, 4, 33, None),
    "soft-cap": (4, 2, 24, 16, None, 2.0),
    "soft-cap and window": (4, 1, 128, 16, 20, 5.0),
    "head dimension 256, odd block": (2, 1, 256, 5, None, None),
}


def sums(new: list[int]) -> torch.Tensor:
    return torch.tensor([0, *new], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)


def prefill(q: torch.Tensor, pages: Pages, new: list[int], **options: Any) -> torch.Tensor:
    return prefill_attention(q, pages.k_cache, pages.v_cache, pages.table, sums(new), pages.context_lens, **options)


def expected(q: torch.Tensor, pages: Pages, new: list[int], window: int | None, cap: float | None) -> torch.Tensor:
    y, start = torch.zeros(q.shape, dtype=torch.float64, device=DEVICE), 0
    for count, k, v in zip(new, pages.keys, pages.values, strict=True):
        if len(k) and count:
            y[start : start + count] = exact(q[start : start + count], k, v, q.shape[2] ** -0.5, window, cap)
        start += count
    return y


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_equals_attention_in_fp64(dtype: torch.dtype, backend: str | None, shape: Any) -> None:
    heads, kv_heads, dim, block, window, cap = shape
    pages = paged(CONTEXTS, kv_heads, dim, block, dtype)
    q = draw(sum(NEW) + 3, heads, dim, dtype=dtype)  # the last three are padding
    with running(backend):
        y = prefill(q, pages, NEW, window=window, softcap=cap)
    assert y.dtype == dtype
    assert relative_error(y, expected(q, pages, NEW, window, cap)) <= TOLERANCE[dtype]
    assert not y[1:3].any()
    assert not y[-3:].any()


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_chunks_make_no_difference(dtype: torch.dtype, backend: str | None, window: int | None) -> None:
    pages = paged([50], 2, 32, 8, dtype)
    q = draw(50, 6, 32, dtype=dtype)
    parts, start = [], 0
    with running(backend):
        whole = prefill(q, pages, [50], window=window)
        for count in (1, 17, 20, 12):
            lens = torch.tensor([start + count], dtype=torch.int32, device=DEVICE)
            seen = Pages([], [], pages.k_cache, pages.v_cache, pages.table, lens)
            parts.append(prefill(q[start : start + count], seen, [count], window=window))
            start += count
    assert relative_error(torch.cat(parts), whole) <= TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_a_token_is_the_same_bits_in_any_chunk(dtype: torch.dtype) -> None:
    pages = paged([50], 2, 64, 8, dtype)
    q = draw(50, 6, 64, dtype=dtype)
    with in_triton(), summed_in_order():
        assert torch.equal(prefill(q[13:], pages, [37]), prefill(q, pages, [50])[13:])


@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_one_token_each_is_decoding(dtype: torch.dtype, backend: str | None) -> None:
    pages = paged([20, 9, 33], 2, 16, 4, dtype, shared=2)
    q = draw(3, 4, 16, dtype=dtype)
    with running(backend):
        one = decode_attention(q, pages.k_cache, pages.v_cache, pages.table, pages.context_lens)
        assert relative_error(prefill(q, pages, [1, 1, 1]), one) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=needs_triton)])
def test_queries_may_be_part_of_a_packed_projection(backend: str | None) -> None:
    pages = paged([13, 22], 2, 16, 4, torch.float32)
    q = draw(35, 8 * 16, dtype=torch.float32)[:, : 4 * 16].unflatten(1, (4, 16))
    with running(backend):
        assert relative_error(prefill(q, pages, [13, 22]), expected(q, pages, [13, 22], None, None)) <= 1e-5


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=needs_triton)])
def test_no_tokens_are_nothing(backend: str | None) -> None:
    pages = paged([5], 1, 16, 4, torch.float32)
    with running(backend):
        assert prefill(draw(0, 2, 16, dtype=torch.float32), pages, [0]).shape == (0, 2, 16)


@needs_triton
@settings(max_examples=8, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=4),
    block=st.sampled_from([1, 3, 16]),
    group=st.integers(1, 8),
    window=st.one_of(st.none(), st.integers(1, 60)),
)
def test_triton_equals_torch_for_any_batch(sequences: Any, block: int, group: int, window: int | None) -> None:
    new = [count for _, count in sequences]
    pages = paged([before + count for before, count in sequences], 1, 16, block, torch.float32)
    q = draw(sum(new), group, 16, dtype=torch.float32)
    plain = prefill(q, pages, new, window=window)
    with in_triton():
        y = prefill(q, pages, new, window=window)
    assert relative_error(y, plain) <= 1e-5


@needs_triton
def test_the_operation_keeps_its_promises_to_the_compiler() -> None:
    pages = paged([9, 3], 1, 16, 4, torch.float32)
    q = draw(5, 2, 16, dtype=torch.float32)
    arguments = (q, pages.k_cache, pages.v_cache, pages.table, sums([2, 3]), pages.context_lens, 0.25, 0, 0.0)
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.rankwise.prefill_attention, arguments, test_utils=checks)
