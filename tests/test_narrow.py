"""Models that have lost channels: written, loaded by transformers and by the engine, refitted, rounded, healed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fourbit import wide_model
from prose import prose
from transformers import AutoModelForCausalLM

import rankwise
from rankwise.alloc.methods import METHODS
from rankwise.anatomy import block_linears, features
from rankwise.compression import compress_to_folder
from rankwise.config import CompressConfig, TextConfig
from rankwise.engine.checkpoint import folder_bytes, verify
from rankwise.engine.doors.vllm.folder import check_folder
from rankwise.errors import RankwiseError
from rankwise.layerspec import LayerSpec
from rankwise.plan import RankPlan
from rankwise.storage import Precision
from rankwise.zoo import load_model

METHOD = rankwise.Global(0.6, rank_multiple=1, channel_multiple=4)
PROMPTS = ["The value of", "A list is", "def main("]


def command(model: Path, out: Path, method: Any = METHOD, **options: Any) -> RankPlan:
    out.with_suffix(".txt").write_text(prose(20_000), encoding="utf-8")
    text = TextConfig(str(out.with_suffix(".txt")), samples=12, gradient_samples=8, seq_len=32, measure=1)
    return compress_to_folder(CompressConfig(str(model), out, method, text, **options))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "opt"])
def test_a_narrow_checkpoint_loads_and_says_the_same_everywhere(
    family: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = command(model_folder(family), tmp_path / "small")
    assert abs(plan.ratio - 0.6) <= 0.0006
    narrow = {name: spec for name, spec in plan if spec.dense_shape}
    assert narrow
    assert narrow.keys() <= plan.compressed.keys()
    assert verify(tmp_path / "small") >= 6
    assert abs(folder_bytes(tmp_path / "small") - plan.total_bytes) < 0.01 * plan.total_bytes + 20_000
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    for name, spec in narrow.items():
        layer = small.get_submodule(name)
        assert (layer.out_features, layer.in_features) == (spec.out_features, spec.in_features)
        assert spec.ratio < 1
    engine = rankwise.LLM(str(tmp_path / "small"), dtype="fp32", max_model_len=64)
    params = rankwise.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    tokenizer = load_model(str(tmp_path / "small"))[1]
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = small.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert output.tokens == expected.tolist()
    small.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(small(ids).logits, again(ids).logits)


def test_its_plan_can_be_carried_out_again(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    command(model_folder("llama"), tmp_path / "a", curvature=tmp_path / "moments")
    given = {"plan": tmp_path / "a" / "plan.json", "curvature": tmp_path / "moments"}
    plan = command(model_folder("llama"), tmp_path / "b", rankwise.Global(0.9), **given)
    assert plan.layers == RankPlan.load(tmp_path / "a" / "plan.json").layers
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_default_method_refits_what_is_left(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    method = rankwise.Rankwise(0.6, rank_multiple=1, channel_multiple=4)
    plan = command(model_folder("llama"), tmp_path / "small", method)
    assert any(spec.dense_shape for _, spec in plan)
    assert plan.provenance["refit"]["layers"] > 0
    assert torch.isfinite(load_model(str(tmp_path / "small"))[0](torch.arange(2, 20)[None]).logits).all()


@pytest.mark.parametrize("refit", [False, True], ids=["factors", "refitted"])
def test_what_is_left_is_rounded_in_its_own_metric(
    refit: bool, tokenizer: Any, tmp_path: Path, liked: Callable[[float], None]
) -> None:
    liked(1.0)
    wide_model().save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    method = rankwise.Global(0.6915, kinds=("dense", "lowrank"), rank_multiple=32, channel_multiple=32)
    options: dict[str, Any] = {"precision": Precision("int4", 32), "refit": refit}
    plan = command(tmp_path / "wide", tmp_path / "small", method, **options)
    narrow = [spec for _, spec in plan if spec.dense_shape]
    assert narrow
    assert all(spec.weights == "int4" for spec in narrow)
    assert verify(tmp_path / "small") >= 6
    ids = torch.arange(2, 34)[None]
    dense, small = (load_model(str(tmp_path / name))[0](ids).logits for name in ("wide", "small"))
    assert torch.isfinite(small).all()
    assert not torch.allclose(dense, small)


def test_scores_keep_all_channels(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    scored = command(model_folder("llama"), tmp_path / "scores", score_only=True)
    plan = command(model_folder("llama"), tmp_path / "b", scores=tmp_path / "scores")
    assert not any(spec.dense_shape for made in (scored, plan) for _, spec in made)


@pytest.mark.parametrize("refit", [False, True], ids=["factors", "refitted"])
def test_what_is_left_can_be_healed(
    refit: bool, model_folder: Callable[[str], Path], tmp_path: Path, liked: Callable[[float], None]
) -> None:
    liked(0.5)
    plan = command(model_folder("llama"), tmp_path / "small", heal=4, refit=refit)
    assert any(spec.dense_shape for _, spec in plan)
    healed = plan.provenance["heal"]
    assert healed["after"] <= healed["before"]
    assert verify(tmp_path / "small") >= 6


def narrowed_by_hand(folder: Path, widths: dict[str, int]) -> Path:
    """A plan that keeps everything but channels of the first block's MLP."""
    linears = {name: features(m) for block in block_linears(load_model(str(folder))[0]) for name, m in block.items()}
    layers = {}
    for name, (m, n) in linears.items():
        leaf = name.rpartition(".")[2] if ".0.mlp." in name else ""
        now = (m, widths.get(leaf, n)) if leaf == "down_proj" else (widths.get(leaf, m), n)
        layers[name] = LayerSpec("dense", *now, min(now), "fp32", dense_shape=None if now == (m, n) else (m, n))
    path = folder.parent / f"plan-{'-'.join(map(str, widths.values()))}.json"
    RankPlan(layers).save(path)
    return path


def test_a_plan_by_hand_must_take_the_same_channels_from_all(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = model_folder("llama")
    given = {"plan": narrowed_by_hand(model, {"gate_proj": 40, "up_proj": 40, "down_proj": 40})}
    assert command(model, tmp_path / "good", **given).ratio < 1
    for number, odd in enumerate(({"gate_proj": 40, "up_proj": 44, "down_proj": 40}, {"gate_proj": 40, "up_proj": 40})):
        given = {"plan": narrowed_by_hand(model, odd)}
        with pytest.raises(RankwiseError, match="layers of one MLP lose the same channels"):
            command(model, tmp_path / str(number), **given)
    given = {"plan": narrowed_by_hand(model, {"gate_proj": 32, "up_proj": 32, "down_proj": 32}), "refit": False}
    with pytest.raises(RankwiseError, match=r"^sides: one; allowed: two"):
        command(model, tmp_path / "one", METHODS["svd-llm"](0.9), **given)


def test_vllm_has_biases_of_the_dense_width(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    plan = command(model_folder("gpt2"), tmp_path / "small")
    with pytest.raises(RankwiseError, match=r"c_fc.bias: of a layer with \d+ outputs left; vLLM's own biases"):
        check_folder(str(tmp_path / "small"), None, plan.compressed)
    command(model_folder("llama"), tmp_path / "llama")
    check_folder(str(tmp_path / "llama"), None, RankPlan.load(tmp_path / "llama" / "plan.json").compressed)
