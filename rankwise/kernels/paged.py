"""What decoding and prefill share: pages of a cache, one step of softmax over a tile, attention in plain PyTorch.

The cache of a layer is `[num_blocks, block_size, kv_heads, head_dim]`, once for keys and once for values. Key j of a
sequence lies in block `block_table[seq, j // block_size]`, slot `j % block_size`.
"""

import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from rankwise.errors import RankwiseError
from rankwise.kernels.backend import cdiv, tl, triton

LOG2E = 1.4426950408889634


@triton.jit
def page_rows(table, keys, wanted, dims, block_stride, slot_stride, BLOCK_SIZE: tl.constexpr):
    """Where rows of one head lie in a paged cache, `[keys, dims]`; anywhere where they are not wanted."""
    block = tl.load(table + keys // BLOCK_SIZE, mask=wanted, other=0).to(tl.int64)
    return (block * block_stride + (keys % BLOCK_SIZE) * slot_stride)[:, None] + dims[None, :]


@triton.jit
def online_softmax(q, k, v, visible, acc, top, total, scale, cap, CAPPED: tl.constexpr):
    """Take one tile of keys into `acc = Σ p v`, `total = Σ p`, `p = 2^(s - top)`. Rows may see no key of the tile."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        s = cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * s)))  # cap tanh(s)
    s = tl.where(visible, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - base[:, None])
    keep = tl.exp2(top - base)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return acc, higher, total * keep + tl.sum(p, 1)


def scales(scale: float, softcap: float) -> dict[str, Any]:
    """Constants of `online_softmax`, whose exponentials have base 2."""
    if softcap:
        return {"scale": scale / softcap, "cap": softcap * LOG2E, "CAPPED": True}
    return {"scale": scale * LOG2E, "cap": 0.0, "CAPPED": False}


def checked(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[float, int, float]:
    """Scale, window and soft-cap with 0 for none."""
    if q.shape[1] % k_cache.shape[2]:
        raise RankwiseError("kv_heads", k_cache.shape[2], f"a divisor of the {q.shape[1]} query heads")
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride():
        raise RankwiseError("v_cache", [*v_cache.shape], "shape and strides of k_cache")
    if window is not None and window < 1:
        raise RankwiseError("window", window, "at least 1, or None")
    return q.shape[2] ** -0.5 if scale is None else scale, window or 0, softcap or 0.0


def gather_pages(cache: torch.Tensor, table: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Keys `first..last` of one sequence, `[kv_heads, last - first, head_dim]`: a view where its blocks follow on."""
    size = cache.shape[1]
    table = table[first // size : cdiv(last, size)]
    blocks = table.tolist()
    follow_on = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
    pages = cache[blocks[0] : blocks[0] + len(blocks)] if follow_on else cache.index_select(0, table)
    skip = first // size * size
    return pages.flatten(0, 1)[first - skip : last - skip].transpose(0, 1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    """Attention of rows `[kv_heads, rows, head_dim]`; `visible [rows, keys]` or None for all."""
    if not softcap:
        return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, scale=scale)[0]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = softcap * torch.tanh(torch.matmul(q, k.mT).to(wide) * (scale / softcap))
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return torch.matmul(scores.softmax(-1).to(q.dtype), v)
