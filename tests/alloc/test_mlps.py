"""Channels are found from tensors alone, in every family, and none where a width is written down elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, PhiConfig

from rankwise.alloc.mlps import Mlp, find_mlp, swapped
from rankwise.alloc.stream import BlockStream
from rankwise.anatomy import block_linears, features, weight_of

CPU = torch.device("cpu")
SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
NAMES = {"opt": (["fc1"], "fc2"), "gpt2": (["c_fc"], "mlp.c_proj"), "phi3": None}
USUAL = (["gate_proj", "up_proj"], "down_proj")
WINDOW = torch.randint(2, 512, (1, 24), generator=torch.Generator().manual_seed(1))


def found(model: Any) -> tuple[list[str], str] | None:
    """The first block's MLP, by the ends of names."""
    stream = BlockStream(model, CPU, WINDOW)
    mlp = find_mlp(stream, 0, block_linears(model)[0], stream.embed(WINDOW))
    if mlp is None:
        return None
    return [name.rpartition(".")[2] for name in mlp.writers], mlp.reader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_family_has_the_channels_that_it_has(dtype: torch.dtype, family: str, tiny: Callable[..., Any]) -> None:
    expected, mlp = NAMES.get(family, USUAL), found(tiny(family, dtype))
    if expected is None:  # gate and up are one layer
        assert mlp is None
    else:
        assert mlp is not None
        assert mlp[0] == expected[0]
        assert mlp[1].endswith(expected[1])


@pytest.mark.parametrize(("config", "writers"), [(PhiConfig, "fc1"), (FalconConfig, "dense_h_to_4h")])
def test_blocks_whose_parts_run_side_by_side(config: Any, writers: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES)).eval().requires_grad_(False)
    mlp = found(model)
    assert mlp is not None
    assert mlp[0] == [writers]


def normed(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(mlp.up_proj(x) * mlp.gate_proj(x), (48,))


def bare_normed(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs at any width, but what one channel becomes depends on the others."""
    inner = mlp.up_proj(x) * mlp.gate_proj(x)
    return inner * inner.square().mean(-1, keepdim=True).rsqrt()


def shared_out(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return mlp.gate_proj(x).softmax(-1) * mlp.up_proj(x)


@pytest.mark.parametrize("inner", [normed, bare_normed, shared_out])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_channels_that_know_of_each_other_are_none(inner: Any, dtype: torch.dtype, tiny: Callable[..., Any]) -> None:
    model = tiny("llama", dtype)
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(inner(mlp, x))
    assert found(model) is None


def test_another_layer_may_be_as_wide() -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": 12, "intermediate_size": 48, "num_key_value_heads": 2}
    mlp = found(AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval().requires_grad_(False))
    assert mlp is not None
    assert mlp[0] == ["gate_proj", "up_proj"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_narrow_layers_run_and_are_put_back(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    block = block_linears(model)[0]
    stream = BlockStream(model, CPU, WINDOW)
    mlp = find_mlp(stream, 0, block, stream.embed(WINDOW))
    assert isinstance(mlp, Mlp)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = torch.arange(1, features(block[mlp.reader])[1], 3)
    fewer = {name: weight_of(block[name])[kept] for name in mlp.writers}
    fewer[mlp.reader] = weight_of(block[mlp.reader])[:, kept]
    with swapped(block, fewer, dict.fromkeys(mlp.writers, kept)):
        narrow = model(WINDOW).logits
    lost = torch.ones(features(block[mlp.reader])[1], dtype=torch.bool)
    lost[kept] = False
    silent = {mlp.reader: weight_of(block[mlp.reader]).clone()}
    silent[mlp.reader][:, lost] = 0
    with swapped(block, silent):
        torch.testing.assert_close(narrow, model(WINDOW).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
