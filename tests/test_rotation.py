"""The rotated model of the benches: the same function, weights off their grid."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.rotation import orthogonal, rotate
from rankwise.anatomy import block_linears
from rankwise.errors import RankwiseError

IDS = torch.arange(2, 50).view(2, 24)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_stay_and_weights_do_not(tiny: Callable[..., Any], family: str) -> None:
    model, turned = tiny(family, torch.float64), tiny(family, torch.float64)
    rotate(turned)
    # a little comes from transformers' norms, which compute in fp32 whatever the weights are
    torch.testing.assert_close(logits(turned), logits(model), rtol=2e-5, atol=2e-5)
    for before, after in zip(block_linears(model), block_linears(turned), strict=True):
        for name in before:
            assert (after[name].weight - before[name].weight).norm() > 0.5 * before[name].weight.norm()


def test_in_fp32_logits_stay_within_rounding(tiny: Callable[..., Any]) -> None:
    model, turned = tiny("llama"), tiny("llama")
    rotate(turned, seed=3)
    before = logits(model)
    assert (logits(turned) - before).abs().max() < 1e-4 * before.abs().max()


def test_biases_of_writers_turn_too(tiny: Callable[..., Any]) -> None:
    def biased() -> Any:
        config = tiny("llama").config
        config.attention_bias = config.mlp_bias = True
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter))
        return model

    model, turned = biased(), biased()
    rotate(turned)
    torch.testing.assert_close(logits(turned), logits(model), rtol=2e-5, atol=2e-5)


def test_head_and_embedding_part_and_norms_are_one(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rotate(model)
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert all((norm == 1).all() for name, norm in model.named_parameters() if "norm" in name)


def test_stored_and_loaded_again_it_is_the_same(tiny: Callable[..., Any], tmp_path: Any) -> None:
    model = tiny("qwen2")
    rotate(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(model))


def test_q_is_orthogonal_and_fixed_by_its_seed() -> None:
    q = orthogonal(32, 5)
    torch.testing.assert_close(q.T @ q, torch.eye(32, dtype=torch.float64))
    assert torch.equal(q, orthogonal(32, 5))
    assert not torch.equal(q, orthogonal(32, 6))


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_other_families_are_refused(tiny: Callable[..., Any], family: str) -> None:
    with pytest.raises(RankwiseError, match="allowed: llama"):
        rotate(tiny(family))
