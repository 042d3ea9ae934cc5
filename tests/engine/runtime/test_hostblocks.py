"""All blocks in one call give, bit for bit, what the decoder gives block by block."""

from typing import Any

import pytest
import torch
from fourbit import random_layer
from tensors import DEVICE
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rankwise.engine.runtime.decoder import Decoder
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.hostblocks import HostBlocks, suits
from rankwise.engine.runtime.loader import convert
from rankwise.engine.runtime.params import SamplingParams
from rankwise.kernels import backend, native
from rankwise.plan import LayerSpec
from rankwise.storage import Precision

BF16 = torch.bfloat16
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, layer_types=LAYER_TYPES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=16, layer_types=LAYER_TYPES),
}
OPTIONS = EngineConfig(blocks=60, block_size=4, most_tokens=16, most_length=80)
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no gcc here"),
    pytest.mark.skipif(DEVICE != "cpu", reason="how a CPU decodes"),
]


def narrow(mlp: Any, width: int) -> None:
    """Leave the first channels of an MLP."""
    for leaf, (m, n) in {"gate_proj": (width, 64), "up_proj": (width, 64), "down_proj": (64, width)}.items():
        linear = nn.Linear(n, m, bias=False).requires_grad_(False)
        linear.weight.copy_(getattr(mlp, leaf).weight[:m, :n])
        setattr(mlp, leaf, linear)


def decoder(
    family: str, kinds: tuple[str, ...] = (), dtype: torch.dtype = BF16, widths: tuple[int, ...] = ()
) -> Decoder:
    """Random weights, every one of them: a lost bias or norm shows. Layers become of the kinds in turn."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif "embed" not in name:
            parameter.mul_(3)
    for layer, width in zip(model.model.layers, widths, strict=bool(widths)):
        narrow(layer.mlp, width)
    linears = [(name, each) for name, each in model.named_modules() if "proj" in name]
    generator = torch.Generator().manual_seed(1)
    for number, (name, each) in enumerate(linears if kinds else []):
        kind, (m, n) = kinds[number % len(kinds)], each.weight.shape
        spec = LayerSpec(kind, m, n, min(m, n) if kind == "dense" else 13 + number % 5)
        spec = spec.stored_as(Precision("int4", 32)) if kind == "dense" else spec
        model.set_submodule(name, random_layer(spec, each.bias is not None, torch.float32, generator))
    return convert(model.to(dtype), 128)


def logits_of(running: Engine, calls: list[bool]) -> list[torch.Tensor]:
    """Of every step of a few requests; notes which steps were one call."""
    rows, forward, call = [], running.forward, native.call

    def noting(name: str, *arguments: Any) -> int:
        seen.append(name)
        return call(name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "call", noting)
        for length in (3, 21, 9):
            running.add(list(range(2, 2 + length)), GREEDY)
        while running.busy:
            seen: list[str] = []
            patch.setattr(running, "forward", lambda batch: rows.append(forward(batch)) or rows[-1])
            running.step()
            calls.append("blocks" in seen)
    return rows


ALIKE: tuple[int, ...] = ()
CASES = [
    pytest.param((), ALIKE, id="dense"),
    pytest.param(("lowrank", "pivot", "dense"), ALIKE, id="compressed"),
    pytest.param((), (96, 53, 36), id="narrow"),
    pytest.param(("lowrank", "pivot"), (40, 96, 27), id="narrow and compressed"),
]


@pytest.mark.parametrize(("kinds", "widths"), CASES)
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_step_is_that_of_the_decoder(family: str, kinds: tuple[str, ...], widths: tuple[int, ...]) -> None:
    model = decoder(family, kinds, widths=widths)
    ours, theirs = Engine(model, OPTIONS), Engine(model, OPTIONS)
    assert isinstance(ours.forward, HostBlocks)
    theirs.forward = lambda batch: model(batch, theirs.keys, theirs.values)
    for cache in (*ours.keys, *ours.values, *theirs.keys, *theirs.values):
        cache.zero_()
    calls: list[bool] = []
    found, wanted = logits_of(ours, calls), logits_of(theirs, [])
    assert len(calls) >= 10
    assert all(calls)  # prompts, too, beside sequences that decode
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    for ours_, theirs_ in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        assert torch.equal(ours_, theirs_)


def test_logits_are_those_of_fp32() -> None:
    """As far as bf16 goes."""
    wanted = logits_of(Engine(decoder("qwen3", ("lowrank", "pivot"), torch.float32), OPTIONS), [])[0]
    found = logits_of(Engine(decoder("qwen3", ("lowrank", "pivot")), OPTIONS), [])[0]
    assert float((found.float() - wanted).norm() / wanted.norm()) < 5e-2


def test_who_goes_without() -> None:
    exact = decoder("llama", dtype=torch.float32)
    assert not suits(exact, *caches(exact))
    model = decoder("llama")
    assert suits(model, *caches(model))
    with backend("torch"):
        assert not suits(model, *caches(model))
        plain = decoder("llama")
    assert not suits(plain, *caches(plain))  # its weights lie as the library wants them
    assert not isinstance(Engine(plain, OPTIONS).forward, HostBlocks)


def caches(model: Decoder) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    running = Engine(model, OPTIONS)
    return running.keys, running.values
