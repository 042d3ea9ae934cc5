"""Steps on a CPU: all blocks are one call of `native_blocks.c`."""

import torch

from rankwise.engine.runtime.batch import Batch
from rankwise.engine.runtime.decoder import Block, Decoder
from rankwise.kernels import native
from rankwise.kernels.native_linear import MANY, HostGroup

GROUPS = ("qkv", "o", "gate_up", "down")
NORMS = ("norm_q", "norm_k", "norm_attention", "norm_out")


class HostBlocks:
    """Runs steps by the function; by the decoder itself where the library has faster products for many tokens.

    Args:
        decoder: for which `suits` holds.
        keys: its cache, as `Decoder.__call__` takes it.
        values: likewise.
    """

    def __init__(self, decoder: Decoder, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.decoder, self.keys, self.values = decoder, keys, values
        after = [*(block.norm_in for block in decoder.blocks[1:]), decoder.norm]
        rows = [_fields(*each) for each in zip(decoder.blocks, after, keys, values, strict=True)]
        self.blocks = torch.tensor(rows, dtype=torch.int64)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits of the rows that the batch wants, `[N, vocabulary]`; writes the cache."""
        alone, n = batch.decoding == len(batch.ids) == len(batch.contexts), len(batch.ids)
        if not native.usable(self.decoder.embed) or (n >= MANY and native.has_tiles()):
            return self.decoder(batch, self.keys, self.values)
        x, stream = self.decoder.begin(batch)
        shape = self.decoder.shape
        tensors = batch.positions, batch.slots, batch.tables, batch.contexts
        cos, pages = self.decoder.blocks[0].rotary.cos, self.keys[0]
        sizes = x.shape[1], shape.heads, shape.kv_heads, shape.head_dim, cos.shape[1], cos.stride(0), pages.shape[1]
        places = (
            *pages.stride()[:3],
            batch.tables.stride(0),
            batch.longest,
            int(shape.gelu),
            len(batch.contexts),
            *(t.data_ptr() for t in tensors),
            0 if alone else batch.bounds.data_ptr(),
        )
        scale = shape.head_dim**-0.5 if shape.scale is None else shape.scale
        factors = shape.eps, float(shape.offset), scale
        if native.call("blocks", 1 << 62, x, stream, self.blocks, (*sizes, *places), len(self.blocks), n, *factors):
            raise MemoryError("no memory for a step")
        return self.decoder.finish(x, batch)


def suits(decoder: Decoder, keys: list[torch.Tensor], values: list[torch.Tensor]) -> bool:
    """Whether the function can run a decoder's blocks."""
    shape = decoder.shape
    if not native.usable(decoder.embed) or decoder.embed.dtype != torch.bfloat16 or shape.softcap:
        return False
    groups = all(isinstance(getattr(block, name), HostGroup) for block in decoder.blocks for name in GROUPS)
    weights = [w for block in decoder.blocks for w in (block.norm_in, block.norm_mlp, *_norms(block)) if w is not None]
    pages = {(cache.dtype, cache.stride()) for cache in (*keys, *values)}
    angles = {(block.rotary.cos.shape[1], block.rotary.cos.stride()) for block in decoder.blocks}
    alike = len(pages) == len(angles) == 1 and all(w.dtype == torch.bfloat16 for w in (*weights, decoder.norm))
    return groups and alike and shape.head_dim % native.LANES == 0 and keys[0].dtype == torch.bfloat16


def _norms(block: Block) -> list[torch.Tensor | None]:
    return [getattr(block, name) for name in NORMS]


def _fields(block: Block, following: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> list[int]:
    """`Block` of native_blocks.c."""
    groups = [number for name in GROUPS for number in getattr(block, name).head.tolist()]
    tensors = [block.norm_mlp, following, *_norms(block), block.rotary.cos, block.rotary.sin, keys, values]
    return [*groups, *(0 if t is None else t.data_ptr() for t in tensors), block.window or 0]
