"""From a transformers model, dense or compressed, to our decoder; block by block, so that weights are there once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rankwise.engine.embeddings import CodedEmbedding, TiedHead
from rankwise.engine.layers import CompressedLinear
from rankwise.engine.runtime.decoder import Block, Decoder, Rotary, Shape
from rankwise.engine.runtime.mixed import Group, group_of, let_go, member_of, stored
from rankwise.errors import RankwiseError
from rankwise.kernels.host import prepare
from rankwise.kernels.int8 import Int8
from rankwise.kernels.native_linear import HostGroup, Layer, host_group, suits

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ROPES = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the length so far
ACTIVATIONS = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}


def is_supported(config: Any) -> bool:
    """Whether the runtime has a decoder of its own for a model, by its configuration."""
    ours = getattr(config, "model_type", "") in FAMILIES and _activation(config) in ACTIVATIONS
    causal = not getattr(config, "use_bidirectional_attention", False)
    return ours and causal and all(kind in ROPES for kind in rope_types(config))


def rope_types(config: Any) -> set[str]:
    """Rotary scalings that a configuration names, of all its layer types."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    return {str(part.get("rope_type") or "default") for part in each}


def fixed_length(config: Any) -> int | None:
    """Tokens up to which the angles of a model do not depend on the length so far; None: they never do."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if kind not in ("dynamic", "longrope"):
        return None
    name = "original_max_position_embeddings"
    whole = config.max_position_embeddings if kind == "dynamic" else 0
    return int(rope.get(name) or getattr(config, name, None) or whole)


def convert(model: Any, most_positions: int) -> Decoder:
    """Take a model's weights; its blocks are empty afterwards.

    Args:
        model: a causal language model of transformers, on its device.
        most_positions: for so many the angles are worked out.

    Raises:
        RankwiseError: another family, or an activation or rotary scaling that is not covered.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise RankwiseError("model_type", config.model_type, f"allowed: {', '.join(FAMILIES)}")
    if not is_supported(config):
        found = f"activation {_activation(config)}, rope_type {' and '.join(sorted(rope_types(config)))}"
        allowed = f"{', '.join(ACTIVATIONS)}; {', '.join(ROPES)}; attention from left to right"
        raise RankwiseError("model", found, f"allowed: {allowed}")
    inner = model.model
    angles = _angles(inner, most_positions)
    blocks = []
    for index, layer in enumerate(inner.layers):
        kind = getattr(layer.self_attn, "layer_type", None) or _layer_type(config, index)
        blocks.append(_block(layer, angles.get(kind, angles[""]), _window(config, kind)))
        _empty(layer)
    table, top = model.get_input_embeddings(), model.get_output_embeddings()
    coded = isinstance(table, CodedEmbedding)
    ends = _coded_ends(table, top) if coded else (*_ends(table.weight.data, top.weight.data), None)
    embed, head, codes = ends
    return Decoder(_shape(config), embed, tuple(blocks), _own(inner.norm.weight.data), head, codes)


def _coded_ends(table: CodedEmbedding, top: Any) -> tuple[torch.Tensor, HostGroup | Int8, Int8 | None]:
    """The same of coded ones: an empty embedding, the head, and the table unless the head's numbers are the same."""
    tied = isinstance(top, TiedHead)
    coded, head = table.table(), table.table() if tied else top.matrix("weight")
    empty = table.weight.data.new_empty(0, table.embedding_dim)
    layers = [Layer(head, None, None, None, len(head.codes))]
    if suits(layers, empty.dtype):
        return empty, host_group(layers), None if tied else Int8(*map(_own, coded))
    coded = Int8(*map(_own, coded))
    return empty, coded if tied else Int8(*map(_own, head)), coded


def _ends(embed: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | HostGroup]:
    """The decoder's embedding and head; what was one tensor stays one where the arithmetic allows it."""
    tied, layers = embed.data_ptr() == head.data_ptr(), [Layer(head, None, None, None, len(head))]
    if suits(layers, head.dtype):
        return embed.new_empty(0, embed.shape[1]) if tied else _own(embed), host_group(layers)
    embed = _own(embed)
    return embed, prepare(embed if tied else _own(head))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """On a CPU a copy: a view into the checkpoint's file would keep all of it in memory."""
    return tensor if tensor.is_cuda else tensor.clone()


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))


def _shape(config: Any) -> Shape:
    gemma = config.model_type == "gemma3_text"
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=dim,
        eps=config.rms_norm_eps,
        offset=gemma,
        scale=config.query_pre_attn_scalar**-0.5 if gemma else None,
        gelu=ACTIVATIONS[_activation(config)],
        embed_scale=config.hidden_size**0.5 if gemma else 1.0,
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
    )


def _block(layer: Any, rotary: Rotary, window: int | None) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    gemma = hasattr(layer, "pre_feedforward_layernorm")
    return Block(
        qkv=packed([attention.q_proj, attention.k_proj, attention.v_proj]),
        o=packed([attention.o_proj]),
        gate_up=packed([mlp.gate_proj, mlp.up_proj]),
        down=packed([mlp.down_proj]),
        norm_in=_own(layer.input_layernorm.weight.data),
        norm_mlp=_own((layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm).weight.data),
        rotary=rotary,
        window=window,
        norm_q=None if q_norm is None else _own(q_norm.weight.data),
        norm_k=None if k_norm is None else _own(k_norm.weight.data),
        norm_attention=_own(layer.post_attention_layernorm.weight.data) if gemma else None,
        norm_out=_own(layer.post_feedforward_layernorm.weight.data) if gemma else None,
    )


def packed(modules: Sequence[nn.Module]) -> Group:
    """Linear modules of any kind as one group."""
    layers = [stored(module) for module in modules]
    weight = modules[0].weight
    if isinstance(weight, torch.Tensor) and suits(layers, weight.dtype):
        return host_group(layers)
    biases = [module.bias.data if isinstance(module.bias, torch.Tensor) else None for module in modules]
    return group_of([member_of(module) for module in modules], biases)


def _empty(layer: nn.Module) -> None:
    """Let go of the linear layers' own tensors, which were copied; norms are shared."""
    for module in layer.modules():
        if isinstance(module, nn.Linear | CompressedLinear):
            let_go(module)


def _angles(inner: Any, count: int) -> dict[str, Rotary]:
    """Cosines and sines by the model's own rotary embedding, per layer type where it has several."""
    rotary, device = inner.rotary_emb, inner.norm.weight.device
    kinds = getattr(rotary, "layer_types", None) or [None]
    positions, like = torch.arange(count, device=device)[None], torch.zeros(1, device=device)
    found: dict[str, Rotary] = {}
    for kind in set(kinds):
        name = rotary.rope_type[kind] if kind else rotary.rope_type
        if name not in ROPES:
            raise RankwiseError("rope_type", name, f"allowed: {', '.join(ROPES)}")
        cos, sin = rotary(like, positions, **({"layer_type": kind} if kind else {}))
        half = cos.shape[-1] // 2  # transformers says each angle twice
        found[kind or ""] = Rotary(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
    found.setdefault("", next(iter(found.values())))
    return found


def _layer_type(config: Any, index: int) -> str:
    types = getattr(config, "layer_types", None)
    if types:
        return str(types[index])
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return "sliding_attention" if sliding else "full_attention"


def layer_kv_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in one layer of a model, by its configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * dim * dtype.itemsize


def layer_windows(config: Any) -> list[int | None]:
    """How many tokens back each layer of a model looks, by its configuration; None: all."""
    return [_window(config, _layer_type(config, index)) for index in range(config.num_hidden_layers)]


def _window(config: Any, kind: str) -> int | None:
    return config.sliding_window if kind == "sliding_attention" else None
