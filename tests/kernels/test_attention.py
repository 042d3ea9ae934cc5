"""Decoding over pages equals attention in fp64, whatever the pages look like and whoever shares the batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import NOWHERE, Pages, exact, paged
from tensors import BACKENDS, DEVICE, TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error, running

from rankwise.errors import RankwiseError
from rankwise.kernels.attention import decode_attention
from rankwise.kernels.backend import backend as forced

RAGGED = [1, 0, 37, 16, 70]
# heads, kv_heads, head_dim, block, window, soft-cap
SHAPES = {
    "gqa": (8, 2, 64, 16, None, None),
    "no shared heads": (2, 2, 80, 16, None, None),
    "one kv head, group of 7": (7, 1, 96, 8, None, None),
    "window shorter than a block": (4, 2, 32, 16, 5, None),
    "window of one": (4, 2, 32, 4, 1, None),
    "window across splits": (6, 2, 16, 4, 33, None),
    "soft-cap": (4, 2, 24, 16, None, 2.0),
    "soft-cap and window": (4, 1, 128, 16, 20, 5.0),
    "head dimension 256, odd block": (2, 1, 256, 5, None, None),
}


def decode(q: torch.Tensor, pages: Pages, **options: Any) -> torch.Tensor:
    return decode_attention(q, pages.k_cache, pages.v_cache, pages.table, pages.context_lens, **options)


def expected(q: torch.Tensor, pages: Pages, window: int | None, cap: float | None) -> torch.Tensor:
    rows = [
        exact(x[None], k, v, q.shape[2] ** -0.5, window, cap)[0] if len(k) else torch.zeros_like(x, dtype=torch.float64)
        for x, k, v in zip(q, pages.keys, pages.values, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_equals_attention_in_fp64(dtype: torch.dtype, backend: str | None, shape: Any) -> None:
    heads, kv_heads, dim, block, window, cap = shape
    pages = paged(RAGGED, kv_heads, dim, block, dtype)
    q = draw(len(RAGGED), heads, dim, dtype=dtype)
    with running(backend):
        y = decode(q, pages, window=window, softcap=cap, split=32)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_error(y, expected(q, pages, window, cap)) <= TOLERANCE[dtype]
    assert not y[1].any()  # a padding row


@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_shared_blocks_serve_all_their_sequences(dtype: torch.dtype, backend: str | None) -> None:
    pages = paged([20, 9, 33], 2, 16, 4, dtype, shared=2)
    assert len(set(pages.table[:, 0].tolist())) == 1
    q = draw(3, 4, 16, dtype=dtype)
    with running(backend):
        y = decode(q, pages)
    assert relative_error(y, expected(q, pages, None, None)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=needs_triton)])
def test_blocks_before_the_window_may_be_gone(backend: str | None) -> None:
    pages = paged([50, 41], 1, 16, 4, torch.float32)
    for row, context in enumerate((50, 41)):
        pages.k_cache[pages.table[row, : (context - 10) // 4].long()] = float("nan")
        pages.table[row, : (context - 10) // 4] = NOWHERE
    q = draw(2, 2, 16, dtype=torch.float32)
    with running(backend):
        y = decode(q, pages, window=10, split=16)
    assert relative_error(y, expected(q, pages, 10, None)) <= 1e-5


@needs_triton
@pytest.mark.parametrize("window", [None, 290])
def test_more_splits_than_are_merged_at_once(window: int | None) -> None:
    pages = paged([330, 256], 1, 16, 16, torch.float32)
    pages.k_cache[pages.table[0, 18].long()] *= 3  # the largest scores come late
    pages.keys[0][18 * 16 : 19 * 16] *= 3
    q = draw(2, 4, 16, dtype=torch.float32)
    with in_triton():
        y = decode(q, pages, window=window, split=16)
    assert relative_error(y, expected(q, pages, window, None)) <= 1e-5


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=needs_triton)])
def test_equal_scores_give_the_exact_mean(backend: str | None) -> None:
    pages = paged([64, 32], 1, 16, 8, torch.float32)
    pages.v_cache.copy_((pages.v_cache * 4).round())
    means = [(4 * v).round().mean(0) for v in pages.values]
    with running(backend):
        y = decode(torch.zeros(2, 1, 16, device=DEVICE), pages, split=16)
    assert torch.equal(y.double(), torch.stack(means))


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=needs_triton)])
def test_huge_scores_choose_one_key(backend: str | None) -> None:
    pages = paged([40], 1, 16, 8, torch.float32)
    q = 1e4 * draw(1, 2, 16, dtype=torch.float32)
    with running(backend):
        y = decode(q, pages, split=16)
    chosen = (q[0].double() @ pages.keys[0][:, 0].T).argmax(-1)
    assert relative_error(y[0], pages.values[0][chosen, 0]) <= 1e-6


@needs_triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_a_sequence_is_alike_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    contexts = [70, 3, 33, 64]
    pages = paged(contexts, 2, 32, 8, dtype)
    q = draw(4, 6, 32, dtype=dtype)
    with in_triton():
        together = decode(q, pages, split=16)
        for row in range(4):
            one = Pages([], [], pages.k_cache, pages.v_cache, pages.table[row : row + 1], pages.context_lens[row:][:1])
            assert torch.equal(decode(q[row : row + 1], one, split=16)[0], together[row])
            assert torch.equal(decode(q[row : row + 1], one, split=16, max_context=512)[0], together[row])


@pytest.mark.parametrize("choice", ["auto", "torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("entry", [NOWHERE, -1, -NOWHERE])
@pytest.mark.parametrize("contexts", [[0, 1], [0, 20, 17], [1, 0]])
def test_a_padding_row_does_not_follow_its_table(contexts: list[int], entry: int, choice: str) -> None:
    """Together with short contexts it once did, and read outside the cache."""
    pages = paged(contexts, 2, 16, 4, torch.float32)
    pages.table[contexts.index(0)] = entry
    q = draw(len(contexts), 4, 16, dtype=torch.float32)
    with forced(choice):
        y = decode(q, pages)
    assert not y[contexts.index(0)].any()
    assert relative_error(y, expected(q, pages, None, None)) <= 1e-5


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=needs_triton)])
def test_queries_may_be_part_of_a_packed_projection(backend: str | None) -> None:
    pages = paged([13, 22], 2, 16, 4, torch.float32)
    packed = draw(2, 8 * 16, dtype=torch.float32)
    q = packed[:, : 4 * 16].unflatten(1, (4, 16))
    with running(backend):
        assert relative_error(decode(q, pages), expected(q, pages, None, None)) <= 1e-5


def test_consecutive_blocks_are_read_where_they_lie() -> None:
    pages = paged([30], 2, 16, 4, torch.float64)
    order = torch.cat((pages.table[0, :8].long(), torch.tensor([0], device=DEVICE)))
    line = torch.arange(8, dtype=torch.int32, device=DEVICE)[None]
    in_line = Pages([], [], pages.k_cache[order], pages.v_cache[order], line, pages.context_lens)
    q = draw(1, 4, 16)
    assert torch.equal(decode(q, in_line), decode(q, pages))


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=needs_triton)])
def test_an_empty_batch_is_nothing(backend: str | None) -> None:
    pages = paged([5], 1, 16, 4, torch.float32)
    with running(backend):
        y = decode_attention(
            draw(0, 2, 16, dtype=torch.float32), pages.k_cache, pages.v_cache, pages.table[:0], pages.context_lens[:0]
        )
    assert y.shape == (0, 2, 16)


@needs_triton
@settings(max_examples=8, deadline=None)
@given(
    contexts=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    block=st.sampled_from([1, 3, 16]),
    group=st.integers(1, 8),
    window=st.one_of(st.none(), st.integers(1, 70)),
)
def test_triton_equals_torch_for_any_batch(contexts: list[int], block: int, group: int, window: int | None) -> None:
    pages = paged(contexts, 1, 16, block, torch.float32)
    q = draw(len(contexts), group, 16, dtype=torch.float32)
    plain = decode(q, pages, window=window)
    with in_triton():
        y = decode(q, pages, window=window, split=16)
    assert relative_error(y, plain) <= 1e-5


@needs_triton
def test_the_operation_keeps_its_promises_to_the_compiler() -> None:
    pages = paged([9, 3], 1, 16, 4, torch.float32)
    q = draw(2, 2, 16, dtype=torch.float32)
    arguments = (q, pages.k_cache, pages.v_cache, pages.table, pages.context_lens, 0.25, 0, 0.0, 16, 16)
    torch.library.opcheck(torch.ops.rankwise.decode_attention, arguments, test_utils=["test_schema", "test_faketensor"])


def test_bad_options_are_named() -> None:
    pages = paged([5], 2, 16, 4, torch.float32)
    q = draw(1, 4, 16, dtype=torch.float32)
    with pytest.raises(RankwiseError, match="kv_heads"):
        decode(q[:, :3], pages)
    with pytest.raises(RankwiseError, match="window"):
        decode(q, pages, window=0)
    with pytest.raises(RankwiseError, match="v_cache"):
        decode_attention(q, pages.k_cache, pages.v_cache[:, :2], pages.table, pages.context_lens)


@needs_triton
def test_a_split_is_a_power_of_two() -> None:
    pages = paged([5], 1, 16, 4, torch.float32)
    with in_triton(), pytest.raises(RankwiseError, match="split"):
        decode(draw(1, 1, 16, dtype=torch.float32), pages, split=24)
