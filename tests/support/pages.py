"""Sequences in a paged cache whose every other place is NaN or out of reach, and their attention in fp64."""

from dataclasses import dataclass

import torch
from tensors import DEVICE, draw
from torch.nn.functional import scaled_dot_product_attention

NOWHERE = 2**30  # an entry of the block table that must not be followed


@dataclass(frozen=True)
class Pages:
    """Keys and values `[context, kv_heads, head_dim]` of each sequence in fp64, and the same in pages."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    table: torch.Tensor
    context_lens: torch.Tensor


def paged(
    contexts: list[int], kv_heads: int, dim: int, block: int, dtype: torch.dtype, shared: int = 0, seed: int = 0
) -> Pages:
    """Random keys and values in blocks that lie in no order; the first `shared` blocks are the same for all."""
    needed = [-(-context // block) for context in contexts]
    free = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    caches = torch.full((2, len(free), block, kv_heads, dim), float("nan"), dtype=dtype)
    table = torch.full((len(contexts), max(needed) + 2), NOWHERE, dtype=torch.int32)
    prefix = [free.pop() for _ in range(shared)]
    start = draw(2, shared * block, kv_heads, dim, seed=seed + 99).to("cpu", dtype)
    everything = []
    for row, context in enumerate(contexts):
        both = draw(2, context, kv_heads, dim, seed=seed + row).to("cpu", dtype)
        common = min(context, shared * block)
        both[:, :common] = start[:, :common]
        blocks = (prefix + [free.pop() for _ in range(needed[row] - shared)])[: needed[row]]
        table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for at in range(context):
            caches[:, blocks[at // block], at % block] = both[:, at]
        everything.append(both.double().to(DEVICE))
    keys, values = [both[0] for both in everything], [both[1] for both in everything]
    lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    return Pages(keys, values, *caches.to(DEVICE).unbind(), table.to(DEVICE), lens)


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None = None, cap: float | None = None
) -> torch.Tensor:
    """Attention of `[n, heads, head_dim]`, the last n tokens, to keys and values `[context, kv_heads, head_dim]`."""
    n, context, group = len(q), len(k), q.shape[1] // k.shape[1]
    q, k, v = q.double().transpose(0, 1), *(x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    position = torch.arange(context - n, context, device=q.device)[:, None]
    key = torch.arange(context, device=q.device)
    visible = (key <= position) & (key > position - (window or context + 1))
    if cap:
        scores = cap * torch.tanh(q @ k.mT * scale / cap)
        return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale).transpose(0, 1)
