"""Attention of many new tokens a sequence over a paged cache: prefill, whole or in chunks.

FlashAttention-2 (Dao, 2023) with the query heads that share a key head packed into the rows of one product. One launch
serves sequences of any lengths: its grid follows the number of tokens and of sequences, never their lengths.
"""

import torch

from rankwise.kernels.attention import native_attention, runs_natively
from rankwise.kernels.backend import launch, power_of_two, tl, triton, use_triton
from rankwise.kernels.native import has_tiles
from rankwise.kernels.paged import attend, checked, gather_pages, online_softmax, page_rows, scales


@triton.jit(do_not_specialize=["tokens", "seqs"])
def _prefill(
    q, k_cache, v_cache, out, block_table, cu_seqlens, context_lens, tokens, seqs,
    q_token, q_head, block_stride, slot_stride, head_stride, table_seq, scale, cap,
    SEQS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = ROWS // GROUP  # tokens of a program
    program, kv_head = tl.program_id(0), tl.program_id(1)
    # Sequence i has the programs from cu[i] // PER + i: enough for its tokens whatever came before it. The tokens
    # after the last sequence are padding, and count as one more sequence, without keys.
    each = tl.arange(0, SEQS)
    starts = tl.load(cu_seqlens + each, mask=each <= seqs, other=0) // PER + each
    seq = tl.sum(((each <= seqs) & (starts <= program)).to(tl.int32), 0) - 1
    begin = tl.load(cu_seqlens + seq)
    end = tl.load(cu_seqlens + seq + 1, mask=seq < seqs, other=tokens)
    context = tl.load(context_lens + seq, mask=seq < seqs, other=0)
    start = begin + (program - begin // PER - seq) * PER
    if start >= end:
        return
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    token = start + rows // GROUP
    alive = (rows < PER * GROUP) & (token < end)
    head = kv_head * GROUP + rows % GROUP
    mask = alive[:, None] & (dims < HEAD_DIM)[None, :]
    wide = token.to(tl.int64)
    q_tile = tl.load(q + (wide * q_token + head * q_head)[:, None] + dims[None, :], mask=mask, other=0.0)
    position = context - end + token  # of each row in its sequence
    last = context - end + tl.minimum(start + PER, end)  # keys that the program's last token sees
    first = tl.maximum(context - end + start - WINDOW + 1, 0) if WINDOW else last * 0
    acc = tl.zeros([ROWS, DIM], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    table = block_table + seq.to(tl.int64) * table_seq
    for tile in range(first // TILE * TILE, last, TILE):
        keys = tile + tl.arange(0, TILE)
        wanted = (keys >= first) & (keys < last)
        at = page_rows(table, keys, wanted, dims, block_stride, slot_stride, BLOCK_SIZE)
        there = wanted[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_cache + kv_head * head_stride + at, mask=there, other=0.0)
        v = tl.load(v_cache + kv_head * head_stride + at, mask=there, other=0.0)
        visible = wanted[None, :] & (keys[None, :] <= position[:, None])
        if WINDOW:
            visible = visible & (keys[None, :] > position[:, None] - WINDOW)
        acc, top, total = online_softmax(q_tile, k, v, visible, acc, top, total, scale, cap, CAPPED)
    mean = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = (wide * tl.num_programs(1) * GROUP + head) * HEAD_DIM
    tl.store(out + to[:, None] + dims[None, :], mean.to(out.dtype.element_ty), mask=mask)


def _launch(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor, scale: float, window: int, softcap: float,
) -> torch.Tensor:  # fmt: skip
    tokens, heads, dim = q.shape
    seqs, (block_size, kv_heads) = len(context_lens), k_cache.shape[1:3]
    group, padded = heads // kv_heads, max(16, power_of_two(dim))
    rows, tile, warps = _tiles(padded, q.element_size())
    rows = max(rows, power_of_two(group))
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    launch(
        _prefill, (tokens // (rows // group) + seqs + 1, kv_heads),
        q, k_cache, v_cache, out, block_table, cu_seqlens, context_lens, tokens, seqs,
        *q.stride()[:2], *k_cache.stride()[:3], block_table.stride(0),
        SEQS=max(64, power_of_two(seqs + 1)), GROUP=group, HEAD_DIM=dim, DIM=padded, ROWS=rows, TILE=tile,
        BLOCK_SIZE=block_size, WINDOW=window, **scales(scale, softcap), num_warps=warps, num_stages=2,
    )  # fmt: skip
    return out


def _tiles(dim: int, item_size: int) -> tuple[int, int, int]:
    """Query rows, keys and warps of a program: within the registers and the shared memory of every chip."""
    if item_size > 2:
        return 32, 16, 8
    return (64, 32, 8) if dim > 128 else (128, 64 if dim <= 64 else 32, 8)


_op = torch.library.custom_op("rankwise::prefill_attention", _launch, mutates_args=())
_op.register_fake(lambda q, *_: q.new_empty(q.shape))


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of the newest tokens of each sequence to all its keys and values in pages.

    Sequence i brings `n = cu_seqlens[i+1] - cu_seqlens[i]` tokens, at the positions `context_lens[i] - n ..
    context_lens[i] - 1`. So a prompt can come in chunks, behind a cached prefix, or as one token (then
    `decode_attention` uses a GPU better). A token's result does not depend on how its prompt was cut into chunks.

    Args:
        q: `[tokens, heads, head_dim]`, the last dimension contiguous; the sequences one after another.
        k_cache: `[num_blocks, block_size, kv_heads, head_dim]` as for `decode_attention`, the new keys written already.
        v_cache: like `k_cache`, of the same strides.
        block_table: `[seqs, max_blocks]` int32, the last dimension contiguous.
        cu_seqlens: `[seqs + 1]` int32, running sums of the new tokens, from 0; tokens past the last are padding.
        context_lens: `[seqs]` int32, keys of each sequence, its new ones counted; at least n, or 0 for padding.
        scale: of the scores; None is `head_dim ** -0.5`.
        window: each token sees the last so many keys, its own counted; None: all of them.
        softcap: scores become `softcap * tanh(score / softcap)`; None or 0: they stay.

    Returns:
        `[tokens, heads, head_dim]`, contiguous; 0 for padding. It has no gradient.

    Raises:
        RankwiseError: the heads do not divide, the caches differ, or an option is out of its range.
    """
    scale, window, softcap = checked(q, k_cache, v_cache, scale, window, softcap)
    if runs_natively(q, k_cache, v_cache, (block_table, cu_seqlens, context_lens), softcap) and not has_tiles():
        return native_attention(q, k_cache, v_cache, block_table, context_lens, cu_seqlens, scale, window)
    arguments = (q, k_cache, v_cache, block_table, cu_seqlens, context_lens, scale, window, softcap)
    return _op(*arguments) if use_triton(q) else prefill_attention_reference(*arguments)


def prefill_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """`prefill_attention` in plain PyTorch, one sequence at a time."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    bounds = cu_seqlens.tolist()
    for row, context in enumerate(context_lens.tolist()):
        begin, end = max(bounds[row], bounds[row + 1] - context), bounds[row + 1]
        if begin < end:
            first = max(0, context - (end - begin) - window + 1) if window else 0
            k, v = (gather_pages(cache, block_table[row], first, context) for cache in (k_cache, v_cache))
            out[begin:end] = _causal(q[begin:end], k, v, scale, window, softcap)
    return out


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """Tokens `[n, heads, head_dim]` at the end of keys `[kv_heads, keys, head_dim]`."""
    n, keys, kv_heads = len(q), k.shape[1], k.shape[0]
    q = q.unflatten(1, (kv_heads, -1))
    group = q.shape[2]
    if n == keys and not softcap and not 0 < window < keys:  # a whole prompt: no mask in memory, group as a batch
        q, k, v = q.permute(2, 1, 0, 3), k.expand(group, -1, -1, -1), v.expand(group, -1, -1, -1)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return y.permute(2, 1, 0, 3).flatten(1, 2)
    position = torch.arange(keys - n, keys, device=q.device).repeat_interleave(group)[:, None]
    key = torch.arange(keys, device=q.device)
    visible = (key <= position) & (key > position - window) if window else key <= position
    y = attend(q.transpose(0, 1).flatten(1, 2), k, v, None if n == 1 else visible, scale, softcap)
    return y.unflatten(1, (n, group)).transpose(0, 1).flatten(1, 2)
