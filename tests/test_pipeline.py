"""A plan in memory: allocated, put into effect, saved; every step does what its factors say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise
from rankwise.pipeline import tensor_bytes


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(2, 512, (6, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["lowrank", "pivot"])
def test_saved_logits_equal_those_in_memory(
    kind: str, tiny: Callable[..., Any], tokenizer: Any, tmp_path: Path, windows: torch.Tensor
) -> None:
    model = tiny("llama")
    plan = rankwise.allocate(model, windows, rankwise.Global(ratio=0.6, kinds=("dense", kind), rank_multiple=1))
    small = rankwise.compress(model, plan)
    in_memory = small(windows).logits
    rankwise.save(small, tokenizer, plan, tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(loaded(windows).logits, in_memory)
    loaded.save_pretrained(tmp_path / "two")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "two")(windows).logits, in_memory)


def test_weights_of_low_rank_lose_nothing(tiny: Callable[..., Any], windows: torch.Tensor) -> None:
    model = tiny("qwen2")
    for name, module in model.model.layers.named_modules():
        if name.endswith("_proj"):
            left, values, right = torch.linalg.svd(module.weight, full_matrices=False)
            module.weight.copy_(left[:, :6] * values[:6] @ right[:6])
    dense = model(windows).logits
    plan = rankwise.allocate(model, windows, rankwise.Global(ratio=0.6, kinds=("pivot",), rank_multiple=1))
    assert relative_error(rankwise.compress(model, plan)(windows).logits, dense) < 1e-3


def test_bytes_count_tied_tensors_once(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    expected = sum(p.numel() * 4 for p in model.parameters())  # parameters() lists a tied tensor once
    assert tensor_bytes(model) == expected
