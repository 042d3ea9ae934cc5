"""Folders as transformers saves them with bitsandbytes' nf4, written without bitsandbytes."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from rankwise.anatomy import block_linears, weight_of
from rankwise.kernels.nf4 import LEVELS, quantize_nf4

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128),
}
QUANTIZATION = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


def small_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose inputs 64 divides, every bias random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "embed" not in name and "wte" not in name and "wpe" not in name:
            parameter.mul_(4)
    model.config.architectures = [type(model).__name__]
    return model


def save(model: Any, tokenizer: Any, folder: Path, *, double: bool, skip: Collection[str] = (), shards: int = 1) -> Any:
    """Write a model's folder, every linear layer of its blocks but those of `skip` in nf4.

    Returns:
        The model, its weights what the folder's codes stand for.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for block in block_linears(model):
        for name, linear in block.items():
            if name not in skip:
                made, numbers = matrix(weight_of(linear), double)
                tensors[f"{name}.weight"] = made.pop("")
                tensors |= {f"{name}.weight.{part}": tensor for part, tensor in made.items()}
                linear.weight.copy_(numbers.T if isinstance(linear, Conv1D) else numbers)
    _write(tensors, folder, shards)
    config = json.loads((folder / "config.json").read_text())
    stored = QUANTIZATION | {"bnb_4bit_use_double_quant": double, "llm_int8_skip_modules": list(skip) or None}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    return model


def matrix(w: torch.Tensor, double: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a matrix by what their names end with, and the numbers `[m, n]` that they stand for, fp32."""
    codes, absmax = quantize_nf4(w)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(w.shape)}
    made = {"": codes.view(-1, 1), "quant_map": torch.tensor(LEVELS)}
    if double:
        flat, levels = absmax.flatten(), torch.linspace(-1, 1, 256)
        offset = float(flat.mean())
        shared = torch.stack([part.abs().max() for part in (flat - offset).split(256)])
        each = shared.repeat_interleave(256)[: len(flat)]
        nearest = ((flat - offset) / each)[:, None].sub(levels).abs().argmin(1)
        made |= {"absmax": nearest.to(torch.uint8), "nested_absmax": shared, "nested_quant_map": levels}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        absmax = (levels[nearest] * each + torch.tensor(offset)).view(absmax.shape)
    else:
        made["absmax"] = absmax.flatten()
    made["quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    pairs = torch.stack([codes >> 4, codes & 15], -1).flatten(1).long()
    numbers = torch.tensor(LEVELS)[pairs].view(len(w), -1, 64) * absmax[..., None]
    return made, numbers.flatten(1)


def _write(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """One file, or tensors in turn into several, so that what belongs together is apart."""
    ready = {name: tensor.contiguous().clone() for name, tensor in sorted(tensors.items())}
    if shards == 1:
        save_file(ready, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {name: f"model-{at % shards + 1:05}-of-{shards:05}.safetensors" for at, name in enumerate(ready)}
    for file in sorted(set(files.values())):
        mine = {name: tensor for name, tensor in ready.items() if files[name] == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
