"""How large the KV cache may be: planned once, from what is free."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.engine.runtime.blocks import BlockPool
from rankwise.engine.runtime.decoder import Decoder
from rankwise.errors import RankwiseError

SHARE = 0.9  # of what a GPU has free
HOST_SHARE = 0.5  # of what host memory has free: other programs live there too
MOST_HOST = 4 << 30  # bytes; a cache that nobody fills is no use


@dataclass(frozen=True)
class MemoryPlan:
    """What the cache will take.

    Args:
        blocks: of the cache.
        block_size: tokens a block.
        block_bytes: of one block over all layers, and over those of a draft model.
        free: bytes that were free.
        workspace: bytes that are left for what a step works out on the way.
    """

    blocks: int
    block_size: int
    block_bytes: int
    free: int
    workspace: int = 0

    @property
    def tokens(self) -> int:
        """That fit."""
        return self.blocks * self.block_size

    def __str__(self) -> str:
        size, free = self.blocks * self.block_bytes / 2**30, self.free / 2**30
        cache = f"KV cache: {self.tokens} tokens in {self.blocks} blocks, {size:.2f} GiB of {free:.2f} GiB free"
        return f"{cache}; up to {self.workspace / 2**30:.2f} GiB for a step"


def make_cache(decoder: Decoder, pool: BlockPool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values of every block of a decoder, each `[num_blocks, block_size, kv_heads, head_dim]`."""
    size = (pool.count, pool.size, decoder.shape.kv_heads, decoder.shape.head_dim)
    keys, values = ([decoder.embed.new_empty(size) for _ in decoder.blocks] for _ in range(2))
    return keys, values


def step_bytes(config: Any, dtype: torch.dtype, tokens: int, rows: int) -> int:
    """What a step of a decoder takes beside weights and cache, about: activations, and logits from which is drawn.

    Args:
        config: of the model.
        dtype: of its activations.
        tokens: of a step, at most.
        rows: sequences that want a token, at most.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * hidden  # the residual stream, its norm, a sum; q, k, v; an MLP
    drawn = 4 * torch.float32.itemsize + torch.int64.itemsize  # of a logit: in fp32, sorted, its place, two sums
    return tokens * (6 * hidden + 3 * inner) * dtype.itemsize + rows * vocabulary * (dtype.itemsize + drawn)


def plan_memory(
    decoder: Decoder,
    block_size: int,
    tokens: int | None,
    wanted: int,
    draft: Decoder | None = None,
    workspace: int = 0,
) -> MemoryPlan:
    """Blocks for the cache; a draft model gets as many of its own.

    Args:
        decoder: loaded, on its device.
        block_size: tokens a block.
        tokens: that the user asks for; None: as many as there is room for, and `wanted` at most.
        wanted: tokens beyond which more would be of no use: all sequences at full length.
        draft: loaded on the same device; or None.
        workspace: bytes that stay free for a step.

    Raises:
        RankwiseError: not even one sequence of one block fits, or what the user asks for does not.
    """
    block_bytes = sum(_block_bytes(each, block_size) for each in (decoder, draft) if each is not None)
    return plan_blocks(block_bytes, decoder.embed.device, block_size, tokens, wanted, workspace)


def plan_blocks(
    block_bytes: int, device: torch.device, block_size: int, tokens: int | None, wanted: int, workspace: int = 0
) -> MemoryPlan:
    """The same for a cache whose blocks take so many bytes over all layers."""
    free = free_bytes(device)
    share = SHARE if device.type == "cuda" else HOST_SHARE
    room = max(0, int(free * share) - workspace)
    fits = (room if device.type == "cuda" else min(room, MOST_HOST)) // block_bytes
    asked = -(-(tokens or wanted) // block_size)
    if fits < 1 or (tokens and asked > fits):
        raise RankwiseError("kv_tokens", tokens or block_size, f"allowed: up to {fits * block_size} (memory is full)")
    return MemoryPlan(min(asked, fits), block_size, block_bytes, free, workspace)


def _block_bytes(decoder: Decoder, size: int) -> int:
    shape = decoder.shape
    return 2 * len(decoder.blocks) * size * shape.kv_heads * shape.head_dim * decoder.embed.element_size()


def free_bytes(device: torch.device) -> int:
    """Of a GPU, whose memory that PyTorch keeps for nobody is given back first, or of host memory within this
    container's limit.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps of a model that was repacked counts as taken
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        return free if limit.strip() == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free
