"""A plan in memory: allocated, put into effect, saved; every step does what its factors say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.solve import product
from rankwise.anatomy import block_linears, weight_of
from rankwise.errors import RankwiseError
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


def test_gradients_are_measured_where_the_method_asks(tiny: Callable[..., Any], windows: torch.Tensor) -> None:
    for method, samples in ((rankwise.SvdLlm(0.6, rank_multiple=1), 0), (rankwise.Global(0.6, rank_multiple=1), 2)):
        plan = rankwise.allocate(tiny("llama"), windows[:4], method, gradient_text=windows[4:])
        assert plan.provenance["curvature"]["gradient_samples"] == samples
        assert plan.provenance["curvature"]["samples"] == 4


def test_gradients_are_those_of_the_first_quarter(tiny: Callable[..., Any], windows: torch.Tensor) -> None:
    method = rankwise.Global(0.6, rank_multiple=1)
    for count, gradients in ((1, 1), (4, 1), (6, 1)):
        said = rankwise.allocate(tiny("llama"), windows[:count], method).provenance["curvature"]
        asked = rankwise.allocate(tiny("llama"), windows[:count], method, gradient_text=windows[:gradients])
        assert said == asked.provenance["curvature"]
        assert (said["samples"], said["gradient_samples"]) == (count, gradients)


@pytest.mark.parametrize("method", [rankwise.Global(0.6), rankwise.SvdLlm(0.6)], ids=["two-sided", "one-sided"])
def test_no_text_is_refused(method: Any, tiny: Callable[..., Any], windows: torch.Tensor) -> None:
    with pytest.raises(RankwiseError, match="text: 0 windows; at least 1"):
        rankwise.allocate(tiny("llama"), windows[:0], method)


def test_methods_that_learn_learn_from_the_text(tiny: Callable[..., Any], windows: torch.Tensor) -> None:
    """And leave the model as it was, in memory alone."""
    model = tiny("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plan = rankwise.allocate(model, windows, rankwise.Ara(0.6, rank_multiple=1, steps=3, train_len=16))
    assert plan.ratio == pytest.approx(0.6, rel=1e-3)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert rankwise.compress(model, plan)(windows).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_refitted_weights_are_put_in(
    family: str, tiny: Callable[..., Any], windows: torch.Tensor, tmp_path: Path
) -> None:
    """Factors of compressed layers and weights of dense ones, in GPT-2's transposed layers too."""
    model = tiny(family)
    plan = rankwise.allocate(model, windows, rankwise.Global(0.8, kinds=("dense", "lowrank"), rank_multiple=1))
    dense = [name for name, spec in plan if spec.kind == "dense"]
    assert len(dense) > 1
    blocks = block_linears(model)
    into, wanted = Refitted(tmp_path / "refit", plan.factors, {}), {}
    for index, block in enumerate(blocks):
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for name in block:
            spec = plan.layers[name]
            m, n, k = spec.out_features, spec.in_features, spec.rank
            layers[name] = {"u": torch.randn(m, k), "v": torch.randn(k, n)}
            if spec.kind == "dense":
                layers[name] = {"weight": torch.randn(m, n)} if name != dense[0] else {}
            kept = weight_of(block[name]).clone()
            wanted[name] = product(layers[name]) if layers[name] else kept
        into.write(index, layers, {})
    small = rankwise.compress(model, plan, into)
    for name, matrix in wanted.items():
        layer = small.get_submodule(name)
        found = layer(torch.eye(matrix.shape[1])) - (0 if layer.bias is None else layer.bias)
        assert torch.allclose(found.T, matrix, atol=1e-3)


def test_refitted_weights_must_fit_the_dtype(tiny: Callable[..., Any], windows: torch.Tensor, tmp_path: Path) -> None:
    model = tiny("llama", torch.float16)
    plan = rankwise.allocate(model, windows, rankwise.Global(1.0, rank_multiple=1))
    into, name = Refitted(tmp_path / "refit", plan.factors, {}), "model.layers.0.self_attn.q_proj"
    into.write(0, {name: {"weight": torch.full((32, 32), 1e6)}}, {})
    into.write(1, {}, {})
    with pytest.raises(RankwiseError, match=rf"^{name}.weight: NaN or Inf after rounding; try --dtype bf16 or fp32$"):
        rankwise.compress(model, plan, into)
