"""A compact decoder for the Llama family: Llama, Mistral, Qwen2, Qwen3, Gemma 3; every linear of any kind, packed."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import embedding

from rankwise.engine.runtime.batch import Batch
from rankwise.engine.runtime.mixed import Group, packed_linear
from rankwise.kernels.attention import decode_attention
from rankwise.kernels.host import host_linear
from rankwise.kernels.int8 import Int8, int8_linear
from rankwise.kernels.int8 import take_rows as take_coded
from rankwise.kernels.native_linear import HostGroup
from rankwise.kernels.native_panels import take_rows
from rankwise.kernels.norm import add_rms_norm, rms_norm
from rankwise.kernels.prefill import prefill_attention
from rankwise.kernels.rotary import rotary_to_cache_
from rankwise.kernels.swiglu import geglu, swiglu


@dataclass(frozen=True)
class Shape:
    """What all blocks share.

    Args:
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: of each.
        eps: of the norms.
        offset: norms multiply by `1 + weight` (Gemma).
        scale: of attention scores.
        softcap: of attention scores, 0 for none.
        gelu: the activation is tanh-GELU, else SiLU.
        embed_scale: factor on the embeddings.
        logit_softcap: of the logits, 0 for none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    offset: bool = False
    scale: float | None = None
    softcap: float = 0.0
    gelu: bool = False
    embed_scale: float = 1.0
    logit_softcap: float = 0.0


@dataclass(frozen=True)
class Rotary:
    """Angles of one kind of layer.

    Args:
        cos: fp32 `[positions, rotary_dim / 2]`.
        sin: likewise.
    """

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Args:
        qkv: q, k and v packed.
        o: output projection.
        gate_up: gate and up packed.
        down: back to the hidden size.
        norm_in: before attention.
        norm_mlp: before the MLP.
        rotary: angles.
        window: the last so many keys are visible; None: all.
        norm_q: per head, or None (Qwen3, Gemma 3).
        norm_k: likewise.
        norm_attention: after attention, before the sum (Gemma 3), or None.
        norm_out: after the MLP, likewise.
    """

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    norm_in: torch.Tensor
    norm_mlp: torch.Tensor
    rotary: Rotary
    window: int | None = None
    norm_q: torch.Tensor | None = None
    norm_k: torch.Tensor | None = None
    norm_attention: torch.Tensor | None = None
    norm_out: torch.Tensor | None = None


@dataclass(frozen=True)
class Decoder:
    """Weights and arithmetic; it keeps no state.

    Args:
        shape: sizes.
        embed: `[vocabulary, hidden]`, or `[0, hidden]` where the head is a group of the same numbers: it is read there.
        blocks: in order.
        norm: the last one.
        head: `[vocabulary, hidden]`, perhaps the embedding itself, perhaps of `kernels.host.prepare`, or a group.
        coded: the embedding in 8 bits, in place of `embed`, which is empty then.
    """

    shape: Shape
    embed: torch.Tensor
    blocks: tuple[Block, ...]
    norm: torch.Tensor
    head: torch.Tensor | HostGroup | Int8
    coded: Int8 | None = None

    @torch.inference_mode()
    def __call__(self, batch: Batch, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
        """Logits `[N, vocabulary]` of the rows that the batch wants; writes the cache.

        Args:
            batch: of one step.
            keys: per block `[num_blocks, block_size, kv_heads, head_dim]`.
            values: likewise.
        """
        shape = self.shape
        norm = partial(rms_norm, eps=shape.eps, offset=shape.offset)
        x, stream = self.begin(batch)
        after = [*(block.norm_in for block in self.blocks[1:]), self.norm]
        for block, k, v, following in zip(self.blocks, keys, values, after, strict=True):
            delta = self._attention(block, x, batch, k, v)
            delta = delta if block.norm_attention is None else norm(delta, block.norm_attention)
            x, stream = add_rms_norm(delta, stream, block.norm_mlp, shape.eps, shape.offset)
            delta = packed_linear(self._gated(block, x), block.down)
            delta = delta if block.norm_out is None else norm(delta, block.norm_out)
            x, stream = add_rms_norm(delta, stream, following, shape.eps, shape.offset)
        return self.finish(x, batch)

    def begin(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first block is given, `[T, hidden]`: the embeddings, normed and as they are."""
        shape = self.shape
        if self.coded is not None:
            stream = take_coded(self.coded, batch.ids, self.embed.dtype)
        elif isinstance(self.head, HostGroup) and not len(self.embed):
            stream = take_rows(self.head.firsts[0].panels, batch.ids)
        else:
            stream = embedding(batch.ids, self.embed)
        if shape.embed_scale != 1:
            stream = stream * float(torch.tensor(shape.embed_scale, dtype=stream.dtype))  # on the host: nothing waits
        return rms_norm(stream, self.blocks[0].norm_in, shape.eps, shape.offset), stream

    def finish(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits of the rows that the batch wants, from what the last norm gave."""
        x = x if len(batch.last) == len(x) else x.index_select(0, batch.last)
        if isinstance(self.head, Int8):
            logits = int8_linear(x, self.head)
        else:
            logits = self.head(x) if isinstance(self.head, HostGroup) else host_linear(x, self.head)
        cap = self.shape.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _attention(
        self, block: Block, x: torch.Tensor, batch: Batch, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        s = self.shape
        heads = packed_linear(x, block.qkv).unflatten(-1, (s.heads + 2 * s.kv_heads, s.head_dim))
        q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), dim=1)
        if block.norm_q is not None and block.norm_k is not None:
            q, k = (rms_norm(y, w, s.eps, s.offset) for y, w in ((q, block.norm_q), (k, block.norm_k)))
        angles = block.rotary
        rotary_to_cache_(q, k, v, angles.cos, angles.sin, batch.positions, k_cache, v_cache, batch.slots)
        options: dict[str, Any] = {"scale": s.scale, "window": block.window, "softcap": s.softcap}
        n, parts = batch.decoding, []
        if n:
            some = {"max_context": batch.longest, **options}
            parts.append(decode_attention(q[:n], k_cache, v_cache, *batch.single, **some))
        if n < len(batch.contexts):
            parts.append(prefill_attention(q[n:], k_cache, v_cache, *batch.several, **options))
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return packed_linear(y.flatten(1), block.o)

    def _gated(self, block: Block, x: torch.Tensor) -> torch.Tensor:
        if not self.shape.gelu and block.gate_up.place is None:
            return packed_linear(x, block.gate_up, swiglu=True)
        gate, up = packed_linear(x, block.gate_up).chunk(2, dim=-1)
        return geglu(gate, up) if self.shape.gelu else swiglu(gate, up)
