"""The main job on every family: compress, save, load, same logits, generate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise
from rankwise.alloc.methods.base import Method
from rankwise.anatomy import weight_of
from rankwise.config import CompressConfig, TextConfig
from rankwise.engine.checkpoint import folder_bytes, verify
from rankwise.pipeline import compress_to_folder, tensor_bytes
from rankwise.zoo import load_model

TEXT = {"samples": 4, "gradient_samples": 2, "seq_len": 32, "measure": 1}


def config(model: Path, out: Path, text: Path, method: Method, **options: Any) -> CompressConfig:
    return CompressConfig(str(model), out, method, TextConfig(str(text), **TEXT), **options)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def put_back(small: Any, dense: Any, plan: rankwise.RankPlan) -> None:
    """Write the weights that the compressed layers stand for into the dense model."""
    assert plan.compressed
    for name, spec in plan.compressed.items():
        layer = small.get_submodule(name)
        assert type(layer).__name__ == {"lowrank": "LowRankLinear", "pivot": "PivotLinear"}[spec.kind]
        product = layer(torch.eye(spec.in_features))
        target = weight_of(dense.get_submodule(name))
        target.copy_((product if layer.bias is None else product - layer.bias).T)


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(2, 512, (6, 32), generator=torch.Generator().manual_seed(3))


def test_every_family_round_trips(
    family: str, model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, windows: torch.Tensor
) -> None:
    out = tmp_path / "small"
    method = rankwise.Global(ratio=0.7, rank_multiple=1)
    plan = compress_to_folder(config(model_folder(family), out, text_file, method))
    assert abs(plan.ratio - 0.7) <= 0.0007
    dense, _ = load_model(str(model_folder(family)))
    small, tokenizer = load_model(str(out))
    again = AutoModelForCausalLM.from_pretrained(out)
    logits = small(windows).logits
    assert torch.equal(logits, again(windows).logits)
    assert relative_error(logits, dense(windows).logits) > 1e-3  # it was changed ...
    put_back(small, dense, plan)
    assert relative_error(logits, dense(windows).logits) < 1e-4  # ... and does what its factors say
    tokens = tokenizer("The value of", return_tensors="pt")
    generated = small.generate(**tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape[1] == tokens["input_ids"].shape[1] + 5
    assert abs(folder_bytes(out) - plan.total_bytes) < 0.01 * plan.total_bytes + 20_000  # headers of a tiny file
    assert verify(out) >= 6


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


def test_ties_biases_and_generation_config_survive(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "llama"
    shutil.copytree(model_folder("llama"), source)
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(settings | {"top_k": 7}))
    compress_to_folder(config(source, tmp_path / "out", text_file, rankwise.Global(ratio=0.5, rank_multiple=1)))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert small.lm_head.weight.data_ptr() == small.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert small.generation_config.top_k == 7
    compress_to_folder(
        config(model_folder("gpt2"), tmp_path / "gpt2", text_file, rankwise.Global(ratio=0.5, rank_multiple=1))
    )
    before, _ = load_model(str(model_folder("gpt2")))
    after, _ = load_model(str(tmp_path / "gpt2"))
    name = "transformer.h.1.mlp.c_fc"
    assert torch.equal(before.get_submodule(name).bias, after.get_submodule(name).bias)


def test_plan_is_plain_data_and_can_be_edited(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    method = rankwise.Global(ratio=0.6, rank_multiple=1)
    plan = compress_to_folder(config(model_folder("llama"), tmp_path / "a", text_file, method))
    edited = json.loads((tmp_path / "a" / "plan.json").read_text())
    name = next(iter(plan.compressed))
    edited["layers"][name] |= {"kind": "lowrank", "rank": 3}
    (tmp_path / "mine.json").write_text(json.dumps(edited))
    options = {"plan": tmp_path / "mine.json", "curvature": tmp_path / "curvature"}
    second = compress_to_folder(config(model_folder("llama"), tmp_path / "b", text_file, method, **options))
    assert second.layers[name].rank == 3
    assert second.layers[name].kind == "lowrank"
    same = [n for n in plan.layers if n != name]
    assert all(second.layers[n] == plan.layers[n] for n in same)
    assert (tmp_path / "curvature" / "curvature.json").is_file()


def test_same_command_same_bytes(model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        method = rankwise.Global(ratio=0.6, rank_multiple=1)
        compress_to_folder(config(model_folder("qwen3"), tmp_path / name, text_file, method))
    assert (tmp_path / "a" / "SHA256SUMS").read_text() == (tmp_path / "b" / "SHA256SUMS").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # no work folder stays


def test_provenance_says_how_it_was_made(model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    method = rankwise.Uniform(ratio=0.6, rank_multiple=2)
    compress_to_folder(config(model_folder("llama"), tmp_path / "a", text_file, method))
    plan = rankwise.RankPlan.load(tmp_path / "a" / "plan.json")
    known = plan.provenance
    assert known["model"] == str(model_folder("llama"))
    assert known["options"]["method"] == "uniform"
    assert known["options"]["rank_multiple"] == 2
    assert known["calibration"]["seed"] == 0
    assert known["versions"]["torch"] == torch.__version__
    assert known["measured"]["compressed"] != known["measured"]["dense"]


def test_bytes_count_tied_tensors_once(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    expected = sum(p.numel() * 4 for p in model.parameters())  # parameters() lists a tied tensor once
    assert tensor_bytes(model) == expected
