"""Where a causal language model keeps its decoder blocks and their linear layers."""

import re
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import RankwiseError

CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its module name: the largest ModuleList of one repeated class.

    Raises:
        RankwiseError: the model has no decoder, or is not a causal language model.
    """
    require_causal(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]
    lists = [(name, blocks) for name, blocks in lists if _linears(blocks)]
    if not lists:
        raise RankwiseError("model", type(model).__name__, "no list of decoder blocks made of linear layers in it")
    return max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))


def require_causal(model: nn.Module) -> None:
    """Raise a RankwiseError unless the model is a causal language model, by the architecture its config names."""
    config = getattr(model, "config", None)
    names = getattr(config, "architectures", None) or [type(model).__name__]
    if getattr(config, "is_encoder_decoder", False) or not any(CAUSAL.search(name) for name in names):
        raise RankwiseError("model", ", ".join(names), "a causal language model with decoder blocks is needed")


def block_linears(model: nn.Module) -> list[dict[str, nn.Module]]:
    """The linear layers of each decoder block: full module name to `nn.Linear` or `Conv1D`, in model order.

    Raises:
        RankwiseError: the model is quantised or compressed already, or a block holds weights that are no matrices
            (fused experts, convolutions).
    """
    stored: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", stored)
        raise RankwiseError("model", f"its weights are stored as {method}", "the dense original is needed")
    prefix, blocks = decoder_blocks(model)
    result = []
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if parameter.ndim > 2:
                raise RankwiseError(
                    f"{prefix}.{index}.{name}",
                    f"shape {tuple(parameter.shape)}",
                    "fused expert tensors and convolutions are not supported yet; blocks of nn.Linear are",
                )
        result.append({f"{prefix}.{index}.{name}": module for name, module in _linears(block)})
    return result


def require_context(model: Any, seq_len: int, field: str = "seq_len") -> None:
    """Raise a RankwiseError if `seq_len` tokens are more than the model's context."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and seq_len > longest:
        raise RankwiseError(field, seq_len, f"allowed: at most {longest}, the model's context")


def weight_of(linear: nn.Module) -> torch.Tensor:
    """The weight as `[out, in]`; GPT-2's Conv1D stores it transposed."""
    weight: Any = linear.weight
    return weight.T if isinstance(linear, Conv1D) else weight


def features(linear: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    out_features, in_features = weight_of(linear).shape
    return int(out_features), int(in_features)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of the decoder blocks, in model order."""
    return {name: features(linear) for block in block_linears(model) for name, linear in block.items()}


def require_finite(linears: list[dict[str, nn.Module]]) -> None:
    """Raise a RankwiseError that names the first weight that holds NaN or Inf."""
    for block in linears:
        for name, linear in block.items():
            if not torch.isfinite(weight_of(linear)).all():
                raise RankwiseError(f"{name}.weight", "NaN or Inf", "finite weights are needed; check the checkpoint")


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)]
