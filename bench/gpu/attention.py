"""Attention over a paged cache against PyTorch's own over a contiguous one, at the shapes of Llama-3-8B."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.work import Contest, Goal, Work
from rankwise.kernels.attention import decode_attention
from rankwise.kernels.prefill import prefill_attention

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
BF16 = torch.bfloat16
TOLERANCE = {torch.bfloat16: 3 * 2**-9, torch.float16: 3 * 2**-12, torch.float32: 1e-5}


def decode(
    seqs: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype = BF16,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    dim: int = DIM,
) -> Contest:
    """One token of each of `seqs` sequences of `context` keys, every sequence full."""
    keys, values, caches, table, lens = _cache(seqs, context, kv_heads, dim, device, dtype)
    q = torch.randn(seqs, heads, dim, device=device, dtype=dtype)
    packed = q.view(seqs, kv_heads, -1, dim)
    attention: Callable[..., torch.Tensor] = scaled_dot_product_attention

    def reference() -> torch.Tensor:
        rows = [attention(*(x[None].double() for x in part)) for part in zip(packed, keys, values, strict=True)]
        return torch.cat(rows).view(seqs, heads, dim)

    return Contest(
        ours=lambda: decode_attention(q, *caches, table, lens),
        peers={
            "sdpa, static cache": lambda: attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0],
            "sdpa, static cache, heads as rows": lambda: attention(packed, keys, values).view(seqs, heads, dim),
        },
        reference=reference,
        tolerance=TOLERANCE[dtype],
    )


def prefill(
    seqs: int,
    new: int,
    before: int,
    device: torch.device,
    dtype: torch.dtype = BF16,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    dim: int = DIM,
) -> Contest:
    """`new` tokens of each of `seqs` sequences, behind `before` keys that are there already."""
    context = before + new
    keys, values, caches, table, lens = _cache(seqs, context, kv_heads, dim, device, dtype)
    q = torch.randn(seqs * new, heads, dim, device=device, dtype=dtype)
    sums = torch.arange(0, seqs * new + 1, new, device=device, dtype=torch.int32)
    heads_first = q.view(seqs, new, heads, dim).transpose(1, 2)
    position = torch.arange(before, context, device=device)[:, None]
    visible = torch.arange(context, device=device) <= position if before else None
    attention = partial(scaled_dot_product_attention, attn_mask=visible, is_causal=not before, enable_gqa=True)

    def reference() -> torch.Tensor:
        rows = [attention(*(x[None].double() for x in part)) for part in zip(heads_first, keys, values, strict=True)]
        return torch.cat(rows).transpose(1, 2).reshape(q.shape)

    return Contest(
        ours=lambda: prefill_attention(q, *caches, table, sums, lens),
        peers={
            "sdpa, contiguous keys": lambda: attention(heads_first, keys, values).transpose(1, 2).reshape(q.shape),
        },
        reference=reference,
        tolerance=TOLERANCE[dtype],
    )


def _cache(
    seqs: int, context: int, kv_heads: int, dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Keys and values `[seqs, kv_heads, context, dim]`, the same in scattered pages, block table and lengths."""
    blocks = -(-context // BLOCK)
    table = torch.randperm(seqs * blocks, device=device).view(seqs, blocks).to(torch.int32)
    both, pages = [], []
    for _ in range(2):
        x = torch.randn(seqs, kv_heads, blocks * BLOCK, dim, device=device, dtype=dtype)
        cache = torch.empty(seqs * blocks, BLOCK, kv_heads, dim, device=device, dtype=dtype)
        cache[table.flatten().long()] = x.transpose(1, 2).reshape(-1, BLOCK, kv_heads, dim)
        both.append(x[:, :, :context])
        pages.append(cache)
    lens = torch.full((seqs,), context, device=device, dtype=torch.int32)
    return both[0], both[1], (pages[0], pages[1]), table, lens


def works() -> list[Work]:
    """Decoding at 1, 16 and 64 sequences and contexts 1024 and 4096; whole prompts and a chunk behind a prefix."""
    lines = []
    for seqs in (1, 16, 64):
        for context in (1024, 4096):
            moved = 2 * 2 * seqs * (context * KV_HEADS + HEADS) * DIM
            goals = (Goal("speedup", 1.0, "sdpa"),)
            name = f"decode, {seqs} x context {context}, {HEADS}/{KV_HEADS} heads of {DIM}, bf16"
            build = partial(decode, seqs, context)
            lines.append(Work("A1", name, build, moved, 4 * seqs * context * HEADS * DIM, goals, cold=moved < 2**28))
    for seqs, new, before in ((1, 4096, 0), (8, 1024, 0), (4, 512, 3584)):
        pairs = new * before + new * (new + 1) // 2
        moved = 2 * 2 * seqs * (new * HEADS + (before + new) * KV_HEADS) * DIM
        name = f"prefill, {seqs} x {new} tokens behind {before}, {HEADS}/{KV_HEADS} heads of {DIM}, bf16"
        build = partial(prefill, seqs, new, before)
        lines.append(Work("A2", name, build, moved, 4 * seqs * pairs * HEADS * DIM, cold=False))
    return lines
