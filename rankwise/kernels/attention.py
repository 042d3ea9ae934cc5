"""Attention of one new token a sequence over a paged cache of keys and values: decoding.

Flash-Decoding (Dao et al., 2023): keys are cut into splits of a fixed SIZE, each split is reduced on its own, and a
second kernel merges them in order. A sequence's result therefore does not depend on what else is in the batch. The
query heads that share a key head are packed into the rows of one product, so keys and values are read once.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from rankwise.errors import RankwiseError
from rankwise.kernels import native
from rankwise.kernels.backend import cdiv, launch, power_of_two, sm_count, tl, triton, use_triton
from rankwise.kernels.paged import attend, checked, gather_pages, online_softmax, page_rows, scales


@triton.jit
def _decode(
    q, k_cache, v_cache, block_table, context_lens, sums, stats, max_splits,
    q_seq, q_head, block_stride, slot_stride, head_stride, table_seq, scale, cap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    worker, kv_head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(context_lens + seq)
    first = tl.maximum(length - WINDOW, 0) if WINDOW else length * 0
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    head = kv_head * GROUP + rows
    q_mask = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_tile = tl.load(q + seq * q_seq + head[:, None] * q_head + dims[None, :], mask=q_mask, other=0.0)
    table = block_table + seq * table_seq
    last = tl.minimum(tl.cdiv(length, SPLIT), first // SPLIT + max_splits)  # never outside sums
    for split in range(first // SPLIT + worker, last, tl.num_programs(0)):
        acc = tl.zeros([ROWS, DIM], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        begin = tl.maximum(split * SPLIT, first // TILE * TILE)
        end = tl.minimum(split * SPLIT + SPLIT, length)
        for tile in range(begin, end, TILE):
            keys = tile + tl.arange(0, TILE)
            wanted = (keys >= first) & (keys < end)
            at = page_rows(table, keys, wanted, dims, block_stride, slot_stride, BLOCK_SIZE)
            there = wanted[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(k_cache + kv_head * head_stride + at, mask=there, other=0.0)
            v = tl.load(v_cache + kv_head * head_stride + at, mask=there, other=0.0)
            acc, top, total = online_softmax(q_tile, k, v, wanted[None, :], acc, top, total, scale, cap, CAPPED)
        to = (seq * tl.num_programs(1) * GROUP + head) * max_splits + split - first // SPLIT
        tl.store(sums + to[:, None] * HEAD_DIM + dims[None, :], acc, mask=q_mask)
        tl.store(stats + to * 2, top, mask=rows < GROUP)
        tl.store(stats + to * 2 + 1, total, mask=rows < GROUP)


@triton.jit
def _combine(
    sums, stats, context_lens, out, max_splits,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one head of one sequence; no split, no key: zero."""
    head, seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(context_lens + seq)
    first = tl.maximum(length - WINDOW, 0) if WINDOW else length * 0
    splits = tl.minimum(tl.cdiv(length, SPLIT) - first // SPLIT, max_splits)
    row = seq * tl.num_programs(0) + head
    dims, chunk = tl.arange(0, DIM), tl.arange(0, CHUNK)
    acc = tl.zeros([DIM], tl.float32)
    top, total = float("-inf"), 0.0
    for start in range(0, splits, CHUNK):
        at = row * max_splits + start + chunk
        there = start + chunk < splits
        tops = tl.load(stats + at * 2, mask=there, other=float("-inf"))
        totals = tl.load(stats + at * 2 + 1, mask=there, other=0.0)
        mask = there[:, None] & (dims < HEAD_DIM)[None, :]
        part = tl.load(sums + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        weight, keep = tl.exp2(tops - higher), tl.exp2(top - higher)
        acc = acc * keep + tl.sum(part * weight[:, None], 0)
        total = total * keep + tl.sum(totals * weight, 0)
        top = higher
    mean = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * HEAD_DIM + dims, mean.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


def _launch(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    context_lens: torch.Tensor, scale: float, window: int, softcap: float, max_context: int, split: int,
) -> torch.Tensor:  # fmt: skip
    seqs, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    padded = max(16, power_of_two(dim))
    splits = cdiv(max_context, split)
    if window:
        splits = min(splits, cdiv(window - 1, split) + 1)
    out = torch.empty((seqs, heads, dim), dtype=q.dtype, device=q.device)
    sums = torch.empty((seqs, heads, splits, dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((seqs, heads, splits, 2), dtype=torch.float32, device=q.device)
    # Few programs do nothing where contexts are short, and one long sequence still has 16 a head.
    workers = min(splits, max(16, cdiv(16 * sm_count(q.device), max(1, seqs * kv_heads))))
    tile = min(split, 64, max(16, (8192 if q.element_size() == 2 else 2048) // padded))
    sizes = {"HEAD_DIM": dim, "DIM": padded, "SPLIT": split, "WINDOW": window}
    launch(
        _decode, (workers, kv_heads, seqs), q, k_cache, v_cache, block_table, context_lens, sums, stats,
        splits, *q.stride()[:2], *k_cache.stride()[:3], block_table.stride(0),
        GROUP=heads // kv_heads, ROWS=max(16, power_of_two(heads // kv_heads)), BLOCK_SIZE=block_size, TILE=tile,
        **sizes, **scales(scale, softcap), num_warps=4, num_stages=3,
    )  # fmt: skip
    launch(_combine, (heads, seqs), sums, stats, context_lens, out, splits, **sizes, CHUNK=16, num_warps=4)
    return out


_op = torch.library.custom_op("rankwise::decode_attention", _launch, mutates_args=())
_op.register_fake(lambda q, *_: q.new_empty(q.shape))


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    max_context: int | None = None,
    split: int = 128,
) -> torch.Tensor:
    """Attend from the last token of each sequence to the keys and values that its pages hold.

    Key j of a sequence lies in block `block_table[seq, j // block_size]`, slot `j % block_size`. Its own key and value
    must have been written before. Blocks may be shared and in any order; only entries that a visible key needs are
    read, so entries past the context or before the window may be anything.

    Args:
        q: `[seqs, heads, head_dim]`, the last dimension contiguous.
        k_cache: `[num_blocks, block_size, kv_heads, head_dim]`, the last dimension contiguous; `kv_heads` divides
            `heads`, and query head h reads key head `h // (heads // kv_heads)`.
        v_cache: like `k_cache`, of the same strides.
        block_table: `[seqs, max_blocks]` int32, the last dimension contiguous.
        context_lens: `[seqs]` int32, keys of each sequence, its own token counted. 0 is a padding row: its output is 0.
        scale: of the scores; None is `head_dim ** -0.5`.
        window: the last so many keys are visible, the token itself counted; None: all of them.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2); None or 0: they stay.
        max_context: no context is longer, a bound that the host knows; None: what `block_table` can name. The size of
            the launch follows it and the shapes alone, so a captured graph serves all lengths.
        split: keys that are reduced together, a power of two from 16. Results depend on it in rounding, and on nothing
            else of the launch. Scratch memory is `seqs * heads * max_context / split * (head_dim + 2)` floats.

    Returns:
        `[seqs, heads, head_dim]`, contiguous. It has no gradient.

    Raises:
        RankwiseError: the heads do not divide, the caches differ, or an option is out of its range.
    """
    scale, window, softcap = checked(q, k_cache, v_cache, scale, window, softcap)
    if runs_natively(q, k_cache, v_cache, (block_table, context_lens), softcap):
        return native_attention(q, k_cache, v_cache, block_table, context_lens, None, scale, window)
    if not use_triton(q):
        return decode_attention_reference(q, k_cache, v_cache, block_table, context_lens, scale, window, softcap)
    if split < 16 or split != power_of_two(split):
        raise RankwiseError("split", split, "a power of two from 16")
    longest = max_context or block_table.shape[1] * k_cache.shape[1]
    return _op(q, k_cache, v_cache, block_table, context_lens, scale, window, softcap, longest, split)


def native_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    context_lens: torch.Tensor, bounds: torch.Tensor | None, scale: float, window: int,
) -> torch.Tensor:  # fmt: skip
    """Attention by `native_attention.c`: pages are read where they lie, a key head of a token by one thread.

    Args:
        q: `[tokens, heads, head_dim]`, for which `runs_natively` holds.
        k_cache: pages; `v_cache` likewise.
        block_table: `[seqs, max_blocks]`.
        context_lens: `[seqs]`.
        bounds: `[seqs + 1]`, where each sequence's tokens begin; None: each brings one.
        scale: of the scores.
        window: 0 for none.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    strides = *q.stride()[:2], *k_cache.stride()[:3], block_table.stride(0)
    sizes = q.shape[1], k_cache.shape[2], q.shape[2], k_cache.shape[1], window, *strides
    work = block_table.shape[1] * k_cache.stride(0) * len(q)
    tensors = q, k_cache, v_cache, block_table, context_lens, bounds, out
    if native.call("attention", work, *tensors, sizes, len(context_lens), len(q), scale, native.wide(q)):
        raise MemoryError("no memory for the scores of attention")
    return out


def runs_natively(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, places: tuple[torch.Tensor, ...], softcap: float
) -> bool:
    """Whether the function does it; `places` are its integers."""
    if softcap or q.shape[2] % native.LANES or any(t.dtype != torch.int32 or t.stride(-1) != 1 for t in places):
        return False
    return native.usable(q, k_cache, v_cache)


def decode_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """`decode_attention` in plain PyTorch: all sequences at once where that wastes little, else one by one."""
    lengths = context_lens.tolist()
    longest = max(lengths, default=0)
    alike = longest * len(lengths) <= 2 * sum(lengths) and (not window or longest <= 2 * window)
    if len(lengths) > 1 and longest and alike and not softcap:
        return _together(q, k_cache, v_cache, block_table, context_lens, longest, scale, window)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    kv_heads = k_cache.shape[2]
    for row, length in enumerate(lengths):
        if length > 0:
            first = max(0, length - window) if window else 0
            k, v = (gather_pages(cache, block_table[row], first, length) for cache in (k_cache, v_cache))
            y = attend(q[row].unflatten(0, (kv_heads, -1)), k, v, None, scale, softcap)
            out[row] = y.flatten(0, 1)
    return out


def _together(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
) -> torch.Tensor:
    """One product for all; past its end a sequence's own last key stands in, and is not seen."""
    size, kv_heads, lengths = k_cache.shape[1], k_cache.shape[2], context_lens[:, None]
    key = torch.arange(longest, device=q.device)
    at = torch.minimum(key, (lengths - 1).clamp_min(0)).long()
    slots = block_table.gather(1, at // size) * size + at % size
    slots = slots.masked_fill(lengths == 0, 0).flatten()  # padding names no block: any will do
    k, v = (
        cache.flatten(0, 1).index_select(0, slots).unflatten(0, at.shape).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    visible = (key < lengths) & (key >= lengths - window) if window else key < lengths
    y = scaled_dot_product_attention(
        q.unflatten(1, (kv_heads, -1)), k, v, attn_mask=visible[:, None, None], scale=scale
    )
    return y.flatten(1, 2).masked_fill(lengths[:, :, None] == 0, 0)
