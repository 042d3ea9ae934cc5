"""The main job on every family: compress, save, load, same logits, generate; and every stage of a command."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prose import prose
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise
from rankwise import compression, room
from rankwise.alloc.methods.base import Method
from rankwise.anatomy import weight_of
from rankwise.compression import compress_to_folder
from rankwise.config import CompressConfig, TextConfig
from rankwise.engine.checkpoint import folder_bytes, verify
from rankwise.errors import RankwiseError
from rankwise.storage import Precision
from rankwise.text import token_windows
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


# --- refit and healing ------------------------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def same(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def quick(model: Path, out: Path, text: Path, method: Method, **options: Any) -> CompressConfig:
    """Without measuring; options of the text go to the text."""
    own = {key: options.pop(key) for key in tuple(options) if key in TextConfig.__dataclass_fields__}
    return CompressConfig(
        str(model), out, method, TextConfig(**({"text": str(text)} | TEXT | {"measure": 0} | own)), **options
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stages are given: `refit` and `heal`, notes of their last call."""
    found: dict[str, Any] = {}

    def watch(name: str) -> None:
        original = getattr(compression, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            found[name] = arguments
            return original(*arguments, **options)

        monkeypatch.setattr(compression, name, watched)

    for name in ("refit", "heal"):
        watch(name)
    return found


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_refitted_weights_reach_the_checkpoint(
    family: str,
    share: float,
    model_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    liked: Callable[[float], None],
) -> None:
    """Factors, and the weights of layers that stay dense; ranks are those of the closed form."""
    liked(share)
    model, options = model_folder(family), {"kinds": ("dense", "lowrank"), "rank_multiple": 1}
    more = {"samples": 24, "gradient_samples": 8}
    plain = compress_to_folder(quick(model, tmp_path / "plain", text_file, rankwise.Global(0.9, **options), **more))
    plan = compress_to_folder(quick(model, tmp_path / "refit", text_file, rankwise.Rankwise(0.9, **options), **more))
    assert plan.layers == plain.layers
    assert plan.provenance["refit"]["layers"] > 0
    assert plan.provenance["refit"]["gain"] > 0
    told = plan.provenance["refit"]["shares"]
    assert told == [{"share": tried, "measured": abs(tried - share)} for tried in (1.0, 0.75, 0.5, 0.0)]
    assert plan.provenance["refit"]["kept"] == share
    assert "refit" not in plain.provenance
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "refit")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    dense = {f"{name}.weight" for name, spec in plan if spec.kind == "dense"}
    factors = {f"{name}.{part}" for name in plan.compressed for part in ("lowrank_u", "lowrank_v")}
    assert moved & dense
    assert moved & factors
    assert moved <= dense | factors
    assert verify(tmp_path / "refit") >= 6
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "refit")
    for name in dense & moved:
        stored = small.get_parameter(name)
        assert torch.equal(stored, after[name])


def test_a_refit_that_loses_does_not_reach_it(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, liked: Callable[[float], None]
) -> None:
    liked(0.0)
    model = model_folder("llama")
    compress_to_folder(quick(model, tmp_path / "plain", text_file, rankwise.Global(0.6, rank_multiple=1)))
    plan = compress_to_folder(quick(model, tmp_path / "refit", text_file, rankwise.Rankwise(0.6, rank_multiple=1)))
    assert plan.provenance["refit"]["kept"] == 0.0
    assert same(tmp_path / "plain", tmp_path / "refit")


def test_part_of_a_refit_is_another_checkpoint(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, liked: Callable[[float], None]
) -> None:
    files = []
    for share in (1.0, 0.75, 0.5, 0.0):
        liked(share)
        out = tmp_path / str(share)
        compress_to_folder(quick(model_folder("llama"), out, text_file, rankwise.Rankwise(0.6, rank_multiple=1)))
        files.append((out / "model.safetensors").read_bytes())
    assert len(set(files)) == 4


def test_refit_can_be_asked_for_and_left_out(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, liked: Callable[[float], None]
) -> None:
    liked(0.75)
    model = model_folder("llama")
    runs = {
        "global": (rankwise.Global(0.6, rank_multiple=1), None),
        "global-refit": (rankwise.Global(0.6, rank_multiple=1), True),
        "rankwise": (rankwise.Rankwise(0.6, rank_multiple=1), None),
        "rankwise-plain": (rankwise.Rankwise(0.6, rank_multiple=1), False),
    }
    for name, (method, wanted) in runs.items():
        compress_to_folder(quick(model, tmp_path / name, text_file, method, refit=wanted))
    assert same(tmp_path / "global", tmp_path / "rankwise-plain")
    assert same(tmp_path / "global-refit", tmp_path / "rankwise")
    assert not same(tmp_path / "global", tmp_path / "rankwise")


def test_a_one_sided_method_is_refitted_in_the_metric_of_the_loss(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    method = rankwise.SvdLlm(0.6, rank_multiple=1)
    plan = compress_to_folder(quick(model_folder("llama"), tmp_path / "out", text_file, method, refit=True))
    assert plan.provenance["curvature"]["gradient_samples"] == 2
    assert plan.provenance["options"]["sides"] == "one"
    assert asked["refit"][3].identity == plan.provenance["curvature"]
    plain = compress_to_folder(quick(model_folder("llama"), tmp_path / "plain", text_file, method))
    assert plain.provenance["curvature"]["gradient_samples"] == 0


@pytest.mark.parametrize("refit", [True, False])
def test_text_that_judges_a_rounding_is_measured_as_the_other_was(
    refit: bool, model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With output gradients where there are any, though the method be one-sided."""
    rounders, make = [], compression.make_rounding
    monkeypatch.setattr(compression, "make_rounding", lambda *a, **k: rounders.append(make(*a, **k)) or rounders[-1])
    options = quick(
        model_folder("llama"), tmp_path / "out", text_file, rankwise.SvdLlm(0.9, rank_multiple=1), refit=refit
    )
    compress_to_folder(replace(options, precision=Precision("int8")))
    assert rounders
    for rounder in rounders:
        assert rounder.curvature.identity["gradient_samples"] == 2 * refit
        assert rounder.held_out.identity["gradient_samples"] == 2 * refit


def test_windows_to_learn_from_are_those_that_calibrate(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    """Six windows of the text: four for the inputs and to fit to, two to judge."""
    model = model_folder("llama")
    compress_to_folder(quick(model, tmp_path / "out", text_file, rankwise.Rankwise(0.6, rank_multiple=1), heal=2))
    _, tokenizer = load_model(str(model))
    windows = token_windows(text_file.read_text(), tokenizer, 32)
    assert torch.equal(asked["refit"][4], windows[:4])
    assert torch.equal(asked["refit"][5], windows[4:6])
    assert torch.equal(asked["heal"][3], windows[:6])
    assert asked["heal"][4] == 2


def test_another_text_can_be_learnt_from(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    model, other = model_folder("llama"), tmp_path / "other.txt"
    other.write_text(prose(6000, seed=1))
    method = rankwise.Rankwise(0.6, rank_multiple=1)
    plan = compress_to_folder(
        quick(model, tmp_path / "out", text_file, method, heal=2, learn=str(other), learn_samples=5)
    )
    _, tokenizer = load_model(str(model))
    windows = token_windows(other.read_text(), tokenizer, 32)[:5]
    assert torch.equal(asked["refit"][4], windows)
    assert torch.equal(asked["heal"][3][:5], windows)
    assert plan.provenance["calibration"]["learn"] == str(other)
    assert plan.provenance["calibration"]["learn_samples"] == 5


def test_healing_starts_from_the_plan_and_keeps_its_ranks(
    tiny: Callable[..., Any], tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    loud = tiny("llama")
    loud.model.embed_tokens.weight.mul_(20)  # else every token is as likely as any other, whatever the layers say
    loud.save_pretrained(tmp_path / "loud")
    tokenizer.save_pretrained(tmp_path / "loud")
    method, more = rankwise.Global(0.4, rank_multiple=1), {"samples": 24}
    plain = compress_to_folder(quick(tmp_path / "loud", tmp_path / "plain", text_file, method, **more))
    plan = compress_to_folder(quick(tmp_path / "loud", tmp_path / "healed", text_file, method, heal=40, **more))
    assert plan.layers == plain.layers
    known = plan.provenance["heal"]
    assert known["steps"] == 40
    assert 0 < known["after"] < known["before"]
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "healed")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert {name.rpartition(".")[2] for name in moved} <= {"lowrank_u", "lowrank_v", "pivot_basis", "pivot_coeff"}
    assert {name.rpartition(".")[0] for name in moved} == set(plan.compressed)


def test_a_model_that_stays_dense_is_not_healed(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    method = rankwise.Rankwise(1.0, rank_multiple=1)
    plan = compress_to_folder(quick(model_folder("llama"), tmp_path / "out", text_file, method, heal=5))
    assert plan.compressed == {}
    assert "heal" not in plan.provenance
    dense = tensors(model_folder("llama"))
    assert all(torch.equal(tensor, dense[name]) for name, tensor in tensors(tmp_path / "out").items())


def test_a_plan_is_refitted_too(model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """With any components of a layer kept, and under the same options as a plan that is made here."""
    model = model_folder("llama")
    first = compress_to_folder(quick(model, tmp_path / "a", text_file, rankwise.Global(0.6, rank_multiple=1)))
    edited = json.loads((tmp_path / "a" / "plan.json").read_text())
    name = next(iter(first.compressed))
    edited["layers"][name] |= {"kind": "lowrank", "rank": 3, "indices": [0, 2, 5]}
    (tmp_path / "mine.json").write_text(json.dumps(edited))
    options = {"plan": tmp_path / "mine.json", "heal": 2}
    plan = compress_to_folder(quick(model, tmp_path / "b", text_file, rankwise.Rankwise(0.6), **options))
    assert plan.layers[name].indices == (0, 2, 5)
    assert plan.provenance["refit"]["layers"] > 0
    assert tensors(tmp_path / "b")[f"{name}.lowrank_u"].shape[1] == 3


def test_a_text_that_changed_since_is_not_learnt_from(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is the same; what was refitted to the old text is not taken for the new one's."""
    other = tmp_path / "other.txt"
    other.write_text(prose(6000, seed=1))
    method, options = rankwise.Rankwise(0.6, rank_multiple=1), {"learn": str(other), "learn_samples": 5}
    command = quick(model_folder("llama"), tmp_path / "out", text_file, method, **options)
    with monkeypatch.context() as patch:
        patch.setattr(compression, "compress", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress_to_folder(command)
    other.write_text(prose(6000, seed=2))
    with pytest.raises(RankwiseError, match=r"^refit: .* was made with other text"):
        compress_to_folder(quick(model_folder("llama"), tmp_path / "out", text_file, method, **options))


# --- scores, and plans from them --------------------------------------------------------------------------------------

CLOSED: dict[str, Method] = {
    "rankwise": rankwise.Rankwise(0.7, rank_multiple=1),
    "uniform": rankwise.Uniform(0.7, rank_multiple=1),
    "d-rank": rankwise.DRank(0.7, rank_multiple=1),
}


@pytest.mark.parametrize("name", CLOSED)
def test_plans_from_scores_are_those_made_directly(
    name: str, model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """To the byte, at any ratio, and no text is read."""
    model, method = model_folder("llama"), CLOSED[name]
    compress_to_folder(quick(model, tmp_path / "scores", text_file, method, score_only=True))
    for ratio in (0.7, 0.55):
        there, here = tmp_path / f"direct-{ratio}", tmp_path / f"from-{ratio}"
        direct = compress_to_folder(quick(model, there, text_file, replace(method, ratio=ratio), refit=False))
        asks = {"scores": tmp_path / "scores", "measure": 4}
        plan = compress_to_folder(quick(model, here, tmp_path / "no.txt", rankwise.Global(ratio), **asks))
        assert plan.layers == direct.layers
        assert same(there, here)
        for key in ("options", "calibration", "curvature", "model", "weights"):
            assert plan.provenance[key] == direct.provenance[key]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_scores_of_a_learning_method_serve_other_ratios(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model, method = model_folder("llama"), rankwise.Ara(0.7, rank_multiple=1, steps=6, train_len=16)
    plan = compress_to_folder(quick(model, tmp_path / "scores", text_file, method, score_only=True))
    direct = compress_to_folder(quick(model, tmp_path / "direct", text_file, method))
    assert plan.layers == direct.layers  # what is learnt is what the command without scores learns
    losses = []
    for ratio in (0.7, 0.5, 0.9):
        out = tmp_path / f"from-{ratio}"
        found = compress_to_folder(quick(model, out, text_file, rankwise.Global(ratio), scores=tmp_path / "scores"))
        assert found.ratio == pytest.approx(ratio, rel=method.tolerance)
        assert found.provenance["options"] == direct.provenance["options"] | {"ratio": ratio}
        assert verify(out) >= 6
        losses.append(sum(spec.rank for _, spec in found))
    assert losses[1] < losses[0] < losses[2]
    shares = [abs(spec.ratio - direct.layers[name].ratio) for name, spec in compress_plan(tmp_path / "from-0.7")]
    assert sum(shares) / len(shares) < 0.1  # at the learnt ratio it is much the same plan


def compress_plan(folder: Path) -> rankwise.RankPlan:
    return rankwise.RankPlan.load(folder / "plan.json")


def test_plans_from_scores_can_be_healed(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    """Then there is a text, and it measures too; what the scores were made from stays in the provenance."""
    model, method = model_folder("llama"), rankwise.Global(0.7, rank_multiple=1)
    compress_to_folder(quick(model, tmp_path / "scores", text_file, method, score_only=True))
    options = {"scores": tmp_path / "scores", "heal": 2, "measure": 1, "samples": 3}
    plan = compress_to_folder(quick(model, tmp_path / "out", text_file, method, **options))
    assert plan.provenance["heal"]["steps"] == 2
    assert plan.provenance["measured"]["windows"] == 1
    assert plan.provenance["calibration"]["samples"] == 4
    assert len(asked["heal"][3]) == 5


def test_scores_are_a_folder_of_factors_and_facts(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    method = rankwise.Ara(0.7, rank_multiple=1, steps=2, train_len=16)
    command = quick(model_folder("llama"), tmp_path / "scores", text_file, method, score_only=True)
    compress_to_folder(command)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    names = sorted(str(path.relative_to(tmp_path / "scores")) for path in (tmp_path / "scores").rglob("*.*"))
    factors = [f"factors/factors{end}" for end in (".json", "_000.safetensors", "_001.safetensors")]
    assert names == ["choices.safetensors", *factors, "scores.json"]
    with pytest.raises(RankwiseError, match=r"^out: .*does not exist yet"):
        quick(model_folder("llama"), tmp_path / "scores", text_file, method, score_only=True)


# --- room -------------------------------------------------------------------------------------------------------------


def test_room_is_asked_for_what_the_stages_leave(
    model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is above what lies in the folders at the end of the work, and not by orders of magnitude."""
    needed: list[int] = []
    used: list[int] = []
    monkeypatch.setattr(room, "require_room", lambda folder, size: needed.append(size))
    original = compression.save

    def weighed(*arguments: Any, **options: Any) -> Any:
        original(*arguments, **options)
        used.append(sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")))

    monkeypatch.setattr(compression, "save", weighed)
    compress_to_folder(
        quick(model_folder("llama"), tmp_path / "out", text_file, rankwise.Rankwise(0.6, rank_multiple=1), heal=3)
    )
    assert 0.8 * used[0] < needed[0] < 4 * used[0]
    compress_to_folder(
        quick(model_folder("llama"), tmp_path / "s", text_file, rankwise.Global(0.6, rank_multiple=1), score_only=True)
    )
    compress_to_folder(
        quick(model_folder("llama"), tmp_path / "f", text_file, rankwise.Global(0.6), scores=tmp_path / "s")
    )
    assert needed[2] < needed[1] < needed[0]
