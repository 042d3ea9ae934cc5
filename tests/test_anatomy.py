"""Where models keep their decoder blocks, and which models are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import rankwise
from rankwise.anatomy import block_linears, decoder_blocks, features, require_context, require_finite, weight_of
from rankwise.errors import RankwiseError

# [out, in] of every linear layer of one block, worked out from the sizes in conftest: hidden 32, MLP 48,
# 4 heads of which 2 hold keys and values, width of a head 8 (16 where the family's configuration says so).
MLP = {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
ATTENTION = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
WIDE_ATTENTION = {"q_proj": (64, 32), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (32, 64)}


def llama_like(attention: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"self_attn.{name}": shape for name, shape in attention.items()} | MLP


ANATOMY: dict[str, tuple[str, dict[str, tuple[int, int]]]] = {
    "llama": ("model.layers", llama_like(ATTENTION)),
    "mistral": ("model.layers", llama_like(ATTENTION)),
    "qwen2": ("model.layers", llama_like(ATTENTION)),
    "qwen3": ("model.layers", llama_like(WIDE_ATTENTION)),
    "gemma3": ("model.layers", llama_like(WIDE_ATTENTION)),
    "phi3": (
        "model.layers",
        {
            "self_attn.o_proj": (32, 32),
            "self_attn.qkv_proj": (64, 32),
            "mlp.gate_up_proj": (96, 32),
            "mlp.down_proj": (32, 48),
        },
    ),
    "opt": (
        "model.decoder.layers",
        {f"self_attn.{name}": (32, 32) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
        | {"fc1": (48, 32), "fc2": (32, 48)},
    ),
    "gpt2": (
        "transformer.h",
        {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)},
    ),
}
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_blocks_and_their_linear_layers(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    prefix, layers = ANATOMY[family]
    found, blocks = decoder_blocks(model)
    assert found == prefix
    assert blocks is model.get_submodule(prefix)
    linears = block_linears(model)
    assert len(linears) == 2
    for index, block in enumerate(linears):
        assert {name: features(m) for name, m in block.items()} == {
            f"{prefix}.{index}.{name}": shape for name, shape in layers.items()
        }
        assert all(model.get_submodule(name) is module for name, module in block.items())
        order = [name for name, _ in model.named_modules()]
        assert sorted(block, key=order.index) == list(block)


def test_nothing_outside_the_blocks_counts(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    outside = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    assert not outside & {id(module) for block in block_linears(model) for module in block.values()}


def test_lists_inside_a_block_or_beside_the_decoder_are_not_taken_for_it(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.model.layers[0].experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model.adapters = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    name, blocks = decoder_blocks(model)
    assert (name, len(blocks)) == ("model.layers", 2)
    assert "model.layers.0.experts.2" in block_linears(model)[0]  # a list of plain linear layers is fine in a block


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_weights_are_out_by_in(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3) if kind == "linear" else Conv1D(3, 5)
    nn.init.normal_(layer.bias)
    x = torch.randn(4, 5)
    assert features(layer) == (3, 5)
    assert torch.allclose(layer(x), x @ weight_of(layer).T + layer.bias, atol=1e-6)
    with torch.no_grad():
        weight_of(layer).zero_()  # a view, so that weights can be put back through it
    assert not layer.weight.any()


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"]], ids=["none", "empty", "named"])
def test_models_made_in_memory_are_known_by_their_class(architectures: Any, tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.config.architectures = architectures
    assert decoder_blocks(model)[0] == "model.layers"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            id="t5-encoder-decoder",
        ),
        pytest.param(
            lambda: BartForConditionalGeneration(
                BartConfig(
                    vocab_size=64,
                    d_model=16,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_attention_heads=2,
                    decoder_attention_heads=2,
                    encoder_ffn_dim=16,
                    decoder_ffn_dim=16,
                )
            ),
            id="bart-encoder-decoder",
        ),
        pytest.param(
            lambda: BertForMaskedLM(
                BertConfig(
                    vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
                )
            ),
            id="bert-masked",
        ),
        pytest.param(lambda: LlamaModel(LlamaConfig(**SMALL)), id="llama-without-head"),
        pytest.param(lambda: nn.Sequential(nn.Linear(3, 3)), id="no-transformer"),
    ],
)
def test_only_causal_language_models_pass(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(RankwiseError, match="a causal language model with decoder blocks is needed") as caught:
        block_linears(make())
    assert caught.value.field == "model"


def test_encoder_decoders_are_refused_by_their_configuration(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(RankwiseError, match=r"LlamaForCausalLM; a causal language model"):
        decoder_blocks(model)


def test_a_model_without_linear_blocks_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.model.layers = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
    with pytest.raises(RankwiseError, match="no list of decoder blocks"):
        decoder_blocks(model)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: MixtralConfig(**SMALL, num_local_experts=2), id="mixtral"),
        pytest.param(
            lambda: Qwen3MoeConfig(**SMALL, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8),
            id="qwen3-moe",
        ),
    ],
)
def test_fused_experts_are_refused_by_name(make: Callable[[], Any]) -> None:
    model = AutoModelForCausalLM.from_config(make())
    with pytest.raises(RankwiseError, match="fused expert tensors and convolutions are not supported yet") as caught:
        block_linears(model)
    assert caught.value.field.startswith("model.layers.0.mlp.experts.")
    assert "shape (2, " in str(caught.value)


def test_compressed_models_are_not_compressed_again(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    windows = torch.randint(2, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    plan = rankwise.allocate(model, windows, rankwise.Uniform(0.6, rank_multiple=1, tolerance=0.1))
    rankwise.compress(model, plan)
    with pytest.raises(RankwiseError, match="rankwise; the dense original is needed"):
        block_linears(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_weight_is_named(value: float, family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    linears = block_linears(model)
    require_finite(linears)
    names = list(linears[1])
    for name in names[1:]:
        weight_of(linears[1][name])[-1, -1] = value
    with pytest.raises(RankwiseError, match="finite weights are needed") as caught:
        require_finite(linears)
    assert caught.value.field == f"{names[1]}.weight"


def test_windows_must_fit_the_context(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    require_context(model, 128)
    with pytest.raises(RankwiseError, match="seq_len: 129; allowed: at most 128"):
        require_context(model, 129)
