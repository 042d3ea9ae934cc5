"""Random models of the Llama family on a device, dense or in any kinds and precisions, without a file or a calibration.

Numbers are drawn where they are used. Every layer keeps the size of its input, so that logits stay near 1 in bf16.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankwise.engine.layers import build_layer
from rankwise.plan import LayerSpec
from rankwise.storage import Precision

GROUP = 64  # columns that share a scale in int4
SPREAD = {False: 4.6, True: 6.5}  # standard deviation of code - 8, and of code - zero, where all codes are as likely
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, as transformers names them; those of Llama-2-7B by default."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    intermediate: int = 11008
    vocabulary: int = 32000

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Name, outputs and inputs of every linear layer of the blocks."""
        wide, tall = self.hidden, self.intermediate
        sizes = {f"self_attn.{name}_proj": (wide, wide) for name in "qkvo"}
        sizes |= {"mlp.gate_proj": (tall, wide), "mlp.up_proj": (tall, wide), "mlp.down_proj": (wide, tall)}
        for block in range(self.layers):
            for name, (outputs, inputs) in sizes.items():
                yield f"model.layers.{block}.{name}", outputs, inputs

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Of one token's keys and values in all layers."""
        return 2 * self.layers * self.hidden * dtype.itemsize

    def other_bytes(self, dtype: torch.dtype) -> int:
        """Of what a step reads beside the blocks' linear layers and the cache: head and norms."""
        return (self.vocabulary + 2 * self.layers + 1) * self.hidden * dtype.itemsize


@dataclass(frozen=True)
class Kind:
    """What a linear layer becomes.

    Args:
        kind: `dense`, `lowrank` or `pivot`.
        kept: share of its parameters.
        int4: its numbers in 4 bits, by groups of 64.
        asymmetric: likewise, with zero points.
    """

    kind: str = "dense"
    kept: float = 1.0
    int4: bool = False
    asymmetric: bool = False

    def __str__(self) -> str:
        return f"int4 by {GROUP}, {self.kind}" if self.int4 else self.kind

    def spec(self, outputs: int, inputs: int, dtype: torch.dtype) -> LayerSpec:
        """Of a layer of this size; its rank the multiple of 8, in int4 of 64, that comes nearest to the share."""
        m, n, step = outputs, inputs, GROUP if self.int4 else 8
        rank: float = min(m, n)
        if self.kind == "lowrank":
            rank = self.kept * m * n / (m + n)
        elif self.kind == "pivot":
            rank = (m + n - math.sqrt((m + n) ** 2 - 4 * self.kept * m * n)) / 2
        if self.kind != "dense":
            rank = max(step, round(rank / step) * step)
        spec = LayerSpec(self.kind, m, n, int(rank), NAMES[dtype])
        return spec.stored_as(Precision("int4", GROUP, self.asymmetric)) if self.int4 else spec


def specs(shape: Shape, kinds: Sequence[Kind], dtype: torch.dtype) -> dict[str, LayerSpec]:
    """What each linear layer becomes: the kinds in turn."""
    found = enumerate(shape.linears())
    return {name: kinds[at % len(kinds)].spec(m, n, dtype) for at, (name, m, n) in found}


def llama(shape: Shape, kinds: Sequence[Kind], device: torch.device, dtype: torch.dtype, positions: int = 512) -> Any:
    """A model of transformers with random numbers, made on its device.

    Args:
        shape: its sizes.
        kinds: what its linear layers become, in turn.
        device: where it is.
        dtype: of all that is not in 4 bits.
        positions: of its rotary embedding.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "vocab_size": shape.vocabulary}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.heads}
    more = {"num_hidden_layers": shape.layers, "max_position_embeddings": positions, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **heads, **more, pad_token_id=0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for name, spec in specs(shape, kinds, dtype).items():
        model.set_submodule(name, build_layer(spec, False, dtype, "meta"))
    model = model.to_empty(device=device)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its angles are no weights
    _draw(model, shape.layers)
    return model


@torch.no_grad()
def _draw(model: Any, layers: int) -> None:
    """Fill all tensors; what one block adds to the residual stream is so small that all together about double it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        path, _, last = name.rpartition(".")
        first = last.startswith(("weight", "lowrank_v", "pivot_basis"))  # of the factors of a layer
        size = (2 * layers) ** -0.5 if first and path.endswith(("o_proj", "down_proj")) else 1.0
        if "rotary" in name:
            continue
        if last == "pivot_index":
            tensor.copy_(torch.randperm(len(tensor), device=tensor.device))
        elif last.endswith(("_int4", "_zero")):
            tensor.random_(0, 16 if last.endswith("_zero") else 256)
        elif last.endswith("_scale"):
            spread = SPREAD[model.get_submodule(path).precision.asymmetric] * (tensor.shape[1] * GROUP) ** 0.5
            tensor.uniform_(0.9, 1.1).mul_(size / spread)
        elif tensor.ndim == 1:
            tensor.normal_(1, 0.1)
        else:
            tensor.normal_(0, 1.0 if "embed" in name else size * tensor.shape[1] ** -0.5)
