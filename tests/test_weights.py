"""`--weights` from options to checkpoint: budgets, healing, scores, and models that are only rounded."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fourbit import wide_model
from safetensors.torch import load_file

import rankwise
from rankwise.cli import main
from rankwise.compression import compress_to_folder
from rankwise.config import CompressConfig, TextConfig
from rankwise.engine.checkpoint import open_checkpoint, verify
from rankwise.errors import RankwiseError
from rankwise.storage import Precision
from rankwise.weights import make_precision
from rankwise.zoo import load_model

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    wide_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(wide: Path, text_file: Path, tmp_path: Path) -> Callable[..., CompressConfig]:
    def make(out: str, method: Any, measure: int = 1, samples: int = 4, **options: Any) -> CompressConfig:
        text = TextConfig(str(text_file), samples, 2, 32, measure)
        return CompressConfig(str(wide), tmp_path / out, method, text, **options)

    return make


def test_options_make_a_precision() -> None:
    assert make_precision("auto", None, False) is None
    assert make_precision("nf4", None, False) == Precision("nf4")
    assert make_precision("int4", None, True) == Precision("int4", 64, True)
    assert make_precision("int4", 128, False) == Precision("int4", 128)
    for wrong in (("auto", 64, False), ("bf16", None, True), ("nf4", 64, False), ("int4", 48, False)):
        with pytest.raises(RankwiseError):
            make_precision(*wrong)


def test_a_model_that_is_only_rounded_is_not_measured(
    config: Callable[..., CompressConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwise.work.measure_factors", pytest.fail)
    asked = config("a", rankwise.Rankwise(1.0), precision=Precision("nf4"), rounding="nearest")
    plan = compress_to_folder(asked)
    assert {(spec.kind, spec.weights) for _, spec in plan} == {("dense", "nf4")}
    assert plan.ratio == 1
    assert plan.bits == 4.5
    assert plan.provenance["curvature"] == {"measured": False}
    measured = plan.provenance["measured"]
    assert 0 < abs(measured["compressed"] / measured["dense"] - 1) < 0.5
    assert verify(tmp_path / "a") >= 6
    given = config("b", rankwise.Rankwise(0.8), plan=tmp_path / "a" / "plan.json", rounding="nearest")
    given = replace(given, text=TextConfig("no.txt", measure=0))  # nobody asks for it
    again = compress_to_folder(given)
    assert again.layers == plan.layers
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_rounding_by_the_curvature_needs_no_factors(
    config: Callable[..., CompressConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwise.work.measure_factors", pytest.fail)
    found = {}
    for rounding in ("feedback", "nearest"):
        asked = config(rounding, rankwise.Rankwise(1.0), precision=Precision("int4", 128), rounding=rounding)
        found[rounding] = compress_to_folder(asked)
    assert found["feedback"].layers == found["nearest"].layers
    assert found["feedback"].provenance["curvature"]["blocks"] == 2
    assert found["feedback"].provenance["rounding"] == "feedback"
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in found)
    assert any(not torch.equal(a[name], b[name]) for name in a if name.endswith("_int4"))
    assert verify(tmp_path / "feedback") >= 6


def test_a_budget_in_ranks_that_groups_divide(config: Callable[..., CompressConfig], tmp_path: Path) -> None:
    asked = config("a", rankwise.Global(0.7, rank_multiple=1, tolerance=0.05), precision=Precision("int4", 32))
    assert asked.method.rank_multiple == 32
    plan = compress_to_folder(asked)
    assert plan.ratio == pytest.approx(0.7, rel=0.05)
    assert all(spec.weights == "int4" for _, spec in plan)
    assert all(spec.rank % 32 == 0 for _, spec in plan)
    assert {spec.kind for _, spec in plan} >= {"pivot"}
    path = tmp_path / "a" / "model.safetensors"
    assert path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") == plan.total_bytes
    assert open_checkpoint(tmp_path / "a")[0] == plan
    assert plan.provenance["precision"] == {"weights": "int4", "group": 32, "asymmetric": False}
    config_b = config("b", rankwise.Global(0.7), plan=tmp_path / "a" / "plan.json", precision=Precision("fp32"))
    other = compress_to_folder(config_b)
    assert {spec.weights for _, spec in other} == {"fp32"}
    assert [spec.rank for _, spec in other] == [spec.rank for _, spec in plan]


def test_healing_comes_before_rounding(config: Callable[..., CompressConfig], tmp_path: Path) -> None:
    method = rankwise.Uniform(0.4, rank_multiple=32, tolerance=0.2)
    options = {"curvature": tmp_path / "curvature", "precision": Precision("int4", 32), "samples": 24}
    rough = compress_to_folder(config("rough", method, **options))
    healed = compress_to_folder(config("healed", method, heal=60, **options))
    assert healed.layers == rough.layers
    assert healed.provenance["heal"]["after"] < healed.provenance["heal"]["before"]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("rough", "healed"))
    assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
    assert any(not torch.equal(a[name], b[name]) for name in a if name.endswith("_int4"))
    assert load_model(str(tmp_path / "healed"))[0].config.quantization_config.layers


def test_plans_from_scores(config: Callable[..., CompressConfig], tmp_path: Path) -> None:
    compress_to_folder(config("scores", rankwise.Global(0.6, rank_multiple=4), score_only=True))
    options = {"scores": tmp_path / "scores", "precision": Precision("nf4")}
    plan = compress_to_folder(config("a", rankwise.Global(1.0, tolerance=0.2), **options))
    assert {spec.weights for _, spec in plan} == {"nf4"}
    assert plan.provenance["options"]["rank_multiple"] == 64


def test_learnt_scores_of_other_ranks_say_what_is_needed(config: Callable[..., CompressConfig], tmp_path: Path) -> None:
    compress_to_folder(config("scores", rankwise.Ara(0.6, rank_multiple=8, steps=1), 0, score_only=True))
    with pytest.raises(RankwiseError, match="allowed: scores made with --rank-multiple 64"):
        compress_to_folder(config("a", rankwise.Global(0.6), scores=tmp_path / "scores", precision=Precision("nf4")))


def test_the_command(wide: Path, text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["compress", str(wide), "--out", str(tmp_path / "out"), "--ratio", "1", "--weights", "int4"]
    command += ["--group", "128", "--asymmetric", "--calibration", str(text_file), "--measure", "1", "--seq-len", "32"]
    command += ["--samples", "4", "--gradient-samples", "2", "--rounding", "nearest", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    told = capfd.readouterr()
    assert ended.value.code == 0
    assert "no calibration: every layer stays dense" in told.err
    assert json.loads(told.out.splitlines()[-1])["bits"] == pytest.approx(4 + 24 / 128)
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "out"), "--json"])
    rows = json.loads(capfd.readouterr().out)["layers"]
    assert {(row["weights"], row["group"], row["asymmetric"]) for row in rows} == {("int4", 128, True)}
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "out"), "--verify"])
    told = capfd.readouterr()
    assert "int4 by 128, asymmetric" in told.err
    assert "4.19 bits" in told.err
