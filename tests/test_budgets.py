"""Budgets of bytes: what users write, what a checkpoint takes, and whole jobs that must fit."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fourbit import wide_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import rankwise
from rankwise.budgets import ByteBudget, budget_met, make_budget, parse_size
from rankwise.candidates import MARGIN
from rankwise.cli import main
from rankwise.compression import compress_to_folder
from rankwise.config import CompressConfig, TextConfig
from rankwise.engine.checkpoint import open_checkpoint, verify
from rankwise.errors import RankwiseError
from rankwise.storage import Precision
from rankwise.zoo import load_model


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    wide_model(hidden=128, intermediate=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(wide: Path, text_file: Path, tmp_path: Path) -> Callable[..., CompressConfig]:
    def make(out: str, budget: ByteBudget | None, method: Any = None, **options: Any) -> CompressConfig:
        text = TextConfig(str(text_file), 4, 2, 32, 0)
        options = {"curvature": tmp_path / "curvature"} | options
        return CompressConfig(str(wide), tmp_path / out, method or rankwise.Global(), text, budget=budget, **options)

    return make


def few(size: str | None, bits: float | None) -> ByteBudget | None:
    """A budget with two precisions to choose from."""
    return make_budget(size, bits, "fp32,int4", 32, False)


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("4.5GiB", 4.5 * 2**30),
        ("300mb", 3 * 10**8),
        ("1e9", 10**9),
        (" 7 k ", 7000),
        ("123456", 123456),
        ("2TiB", 2**41),
    ],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "five", "5 GBs", "-5GB", "5PB", "1.2.3MB", "nan", "5GB 3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RankwiseError, match=r"^size: .*e\.g\. 5GB"):
        parse_size(text)


@given(st.integers(1, 10**15))
def test_a_plain_number_is_itself(number: int) -> None:
    assert parse_size(str(number)) == number


def test_options_make_a_budget() -> None:
    assert make_budget(None, None, "auto", None, False) is None
    every = make_budget("5GB", None, "auto", None, False)
    assert every is not None
    int4 = tuple(Precision("int4", group) for group in (32, 64, 128))
    assert every.for_model("fp16") == (Precision("fp16"), Precision("nf4"), *int4, Precision("int8"))
    some = make_budget(None, 3.2, "bf16,int4", 64, True)
    assert some is not None
    assert some.for_model("bf16") == (Precision("bf16"), Precision("int4", 64, True))
    only = make_budget(None, 3.2, "nf4", None, False)
    assert only is not None
    assert only.for_model("bf16") == (Precision("nf4"),)
    with pytest.raises(RankwiseError, match=r"^weights: bf16; the model is loaded in fp32"):
        some.for_model("fp32")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("5GB", 3.0, "auto", None, False), "^size: 5000000000, with bits_per_weight 3.0"),
        (("0", None, "auto", None, False), "^size: 0; allowed"),
        ((None, 0.0, "auto", None, False), "^bits_per_weight: 0.0; allowed: above 0 and at most 32"),
        ((None, float("nan"), "auto", None, False), "^bits_per_weight: nan"),
        ((None, 3.0, "bf16,int5", None, False), "^weights: int5; allowed: bf16, fp16, fp32, nf4, int4"),
        ((None, 3.0, "auto", 48, False), "^group: 48; allowed for int4: 32, 64, 128"),
        ((None, 3.0, "nf4", 64, False), "^group: 64; allowed: where int4"),
        ((None, 3.0, "nf4", None, True), "^asymmetric: True; allowed: where int4"),
    ],
)
def test_bad_budgets(arguments: Any, error: str) -> None:
    with pytest.raises(RankwiseError, match=error):
        make_budget(*arguments)


@pytest.mark.parametrize("bits", [3.0, 9.0])
def test_bits_are_met_and_never_exceeded(bits: float, config: Callable[..., CompressConfig]) -> None:
    plan = compress_to_folder(config("a", few(None, bits), rankwise.Global(rank_multiple=1, tolerance=0.005)))
    assert bits * 0.985 < plan.bits <= bits
    assert plan.provenance["budget"]["bits"] == bits
    assert plan.provenance["rounding"] == "feedback"
    assert "int4" in {spec.weights for _, spec in plan}
    tried = plan.provenance["candidates"]
    assert 1 <= len(tried) <= 3
    assert all((entry["measured"] is None) == (len(tried) == 1) for entry in tried)


def test_one_candidate_is_the_prediction(config: Callable[..., CompressConfig]) -> None:
    plan = compress_to_folder(config("a", few(None, 3.0), rankwise.Global(rank_multiple=1), candidates=1))
    assert [entry["measured"] for entry in plan.provenance["candidates"]] == [None]
    with pytest.raises(RankwiseError, match=r"^candidates: 0; allowed: a whole number from 1"):
        config("b", few(None, 3.0), candidates=0)


@pytest.mark.parametrize("size", [450_000, 700_000, 1_200_000])
def test_a_size_is_that_of_the_weight_files(size: int, config: Callable[..., CompressConfig], tmp_path: Path) -> None:
    plan = compress_to_folder(config("a", few(str(size), None), rankwise.Global(rank_multiple=1)))
    assert 0.985 * size < weight_bytes(tmp_path / "a") <= size
    assert verify(tmp_path / "a") >= 6
    assert open_checkpoint(tmp_path / "a")[0] == plan


def test_embeddings_in_8_bits_leave_more_for_the_layers(config: Callable[..., CompressConfig], tmp_path: Path) -> None:
    budget, method = few("700000", None), rankwise.Global(rank_multiple=1)
    plain = compress_to_folder(config("a", budget, method))
    coded = compress_to_folder(config("b", budget, method, embeddings="int8"))
    assert coded.embeddings == {"model.embed_tokens": "int8"}
    assert coded.bytes > plain.bytes + 0.95 * (plain.other_bytes - coded.other_bytes)
    for out in ("a", "b"):
        assert 0.985 * 700_000 < weight_bytes(tmp_path / out) <= 700_000
        assert verify(tmp_path / out) >= 6
    assert coded.provenance["embeddings"] == "int8"
    assert "`model.embed_tokens` is stored as int8." in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(RankwiseError, match=r"^embeddings: nf4; allowed: int8"):
        config("c", budget, embeddings="nf4")
    with pytest.raises(RankwiseError, match=r"^score_only: with embeddings"):
        config("c", None, score_only=True, embeddings="int8")


def test_more_than_dense_is_the_dense_model(config: Callable[..., CompressConfig], tmp_path: Path, wide: Path) -> None:
    plan = compress_to_folder(config("a", few("1GB", None)))
    assert not plan.compressed
    before, after = load_file(wide / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


def test_what_is_kept_stays(config: Callable[..., CompressConfig]) -> None:
    method = rankwise.Global(keep=("*.down_proj", "model.layers.0.self_attn.?_proj"), rank_multiple=1, tolerance=0.02)
    plan = compress_to_folder(config("a", few(None, 14.0), method))
    for name, spec in plan:
        if name.endswith("down_proj") or ".0.self_attn" in name:
            assert (spec.kind, spec.weights) == ("dense", "fp32")
    assert plan.quantised
    method = rankwise.Global(0.7, keep=("*.down_proj",), rank_multiple=32, tolerance=0.1)
    plan = compress_to_folder(config("b", None, method, precision=Precision("int4", 32)))
    assert {spec.weights for name, spec in plan if name.endswith("down_proj")} == {"fp32"}
    assert {spec.weights for name, spec in plan if not name.endswith("down_proj")} == {"int4"}
    with pytest.raises(RankwiseError, match=r"^keep: \*.wi; a pattern that layers match"):
        compress_to_folder(config("c", few(None, 9.0), rankwise.Global(keep=("*.wi",))))


@pytest.mark.parametrize("bits", [2.95, 20.0])
def test_channels_go_where_bytes_are_better_spent_without(
    bits: float, config: Callable[..., CompressConfig], tmp_path: Path
) -> None:
    method = rankwise.Global(rank_multiple=1, channel_multiple=32, tolerance=0.005)
    plan = compress_to_folder(config("a", few(None, bits), method, candidates=6))
    tried = plan.provenance["candidates"]
    narrow = [entry for entry in tried if entry["of"].startswith("fewer channels, ")]
    assert narrow
    if bits < 4:  # the tiny model's channels are all alike: ranks alone are predicted to lose more
        assert narrow[0] is tried[0]
    assert tried == sorted(tried, key=lambda entry: entry["predicted"])
    best = min(tried, key=lambda entry: entry["measured"] or 0.0)
    chosen = best if best["measured"] and tried[0]["measured"] - best["measured"] > MARGIN else tried[0]
    assert plan.loss == pytest.approx(chosen["predicted"])
    assert any(spec.dense_shape for _, spec in plan) == chosen["of"].startswith("fewer channels, ")
    assert bits * 0.985 < plan.bits <= bits
    assert 8 * plan.bytes / plan.dense_parameters == pytest.approx(plan.bits)
    assert verify(tmp_path / "a") >= 6
    prompt = torch.arange(2, 34)
    expected = load_model(str(tmp_path / "a"))[0].generate(
        prompt[None], max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    params = rankwise.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    [output] = rankwise.LLM(str(tmp_path / "a"), dtype="fp32", max_model_len=64).generate([prompt.tolist()], params)
    assert output.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("weights", "group", "bits"), [("fp32,int4", None, 6.0), ("int4", 128, 4.2), ("nf4,int8", None, 4.4)]
)
def test_widths_that_other_groups_fit(
    weights: str, group: int | None, bits: float, tokenizer: Any, config: Callable[..., CompressConfig], tmp_path: Path
) -> None:
    """Some formats fit the whole layer alone, some a narrower one alone: neither is in the way of the others."""
    wide_model(hidden=128, intermediate=128 if group else 192).save_pretrained(tmp_path / "odd")
    tokenizer.save_pretrained(tmp_path / "odd")
    method = rankwise.Global(rank_multiple=1, channel_multiple=32, tolerance=0.05)
    asked = replace(config("a", make_budget(None, bits, weights, group, False), method), model=str(tmp_path / "odd"))
    plan = compress_to_folder(replace(asked, curvature=tmp_path / "own"))
    assert plan.bits <= bits
    assert verify(tmp_path / "a") >= 6
    for _, spec in plan:
        assert spec.in_features % spec.precision.block == 0 or not spec.quantised


def test_killed_and_kept_layers_with_fewer_channels(
    config: Callable[..., CompressConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is stopped once its narrow factors are there goes on to what it would have come to."""
    method = rankwise.Global(rank_multiple=1, channel_multiple=32, tolerance=0.01, keep=("*.0.mlp.*",))
    options: dict[str, Any] = {"budget": few(None, 11.0), "method": method, "candidates": 1}
    plan = compress_to_folder(config("a", **options))
    narrow = {name for name, spec in plan if spec.dense_shape}
    assert narrow
    assert not any(".0.mlp." in name for name in narrow)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rankwise.compression.choose", stop)
        with pytest.raises(KeyboardInterrupt):
            compress_to_folder(config("b", **options))
    assert list((tmp_path / ".b.rankwise").glob("narrow-*"))
    compress_to_folder(config("b", **options))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_refit_and_healing_come_before_rounding(config: Callable[..., CompressConfig], tmp_path: Path) -> None:
    refitted = compress_to_folder(config("a", few(None, 3.4), rankwise.Rankwise(rank_multiple=1), heal=2))
    assert refitted.provenance["refit"]["layers"] >= 0
    assert refitted.provenance["heal"]["steps"] == 2
    assert refitted.bits <= 3.4
    assert verify(tmp_path / "a") >= 6


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"budget": make_budget(None, 0.001, "auto", None, False)}, "^bits_per_weight: .*the smallest possible: "),
        ({"budget": make_budget(None, 9.0, "bf16", None, False)}, "^weights: bf16; the model is loaded in fp32"),
    ],
)
def test_out_of_reach(options: dict[str, Any], error: str, config: Callable[..., CompressConfig]) -> None:
    with pytest.raises(RankwiseError, match=error):
        compress_to_folder(config("a", **options))


@pytest.mark.parametrize("asked", ["280kB", "1kB"])
def test_the_smallest_size_is_told_and_can_be_had(
    asked: str, config: Callable[..., CompressConfig], tmp_path: Path
) -> None:
    with pytest.raises(RankwiseError, match=r"^size: \d+ bytes; allowed: from \d+ bytes \(\d+ for") as caught:
        compress_to_folder(config("a", make_budget(asked, None, "auto", None, False)))
    least, beside, layers = map(int, re.findall(r"\d+", str(caught.value))[1:])
    assert least == beside + layers
    plan = compress_to_folder(config("a", make_budget(str(least), None, "auto", None, False)))
    assert plan.bytes == layers
    assert weight_bytes(tmp_path / "a") <= least
    with pytest.raises(RankwiseError, match=rf"^size: {least - 1} bytes; allowed: from {least} bytes"):
        compress_to_folder(config("b", make_budget(str(least - 1), None, "auto", None, False)))


def test_a_group_that_divides_no_layer_is_named(config: Callable[..., CompressConfig], model_folder: Any) -> None:
    narrow = replace(config("a", make_budget(None, 3.0, "int4", 128, False)), model=str(model_folder("llama")))
    with pytest.raises(RankwiseError, match=r"^group: 128; 128 does not divide in_features of .* \d+; allowed: "):
        compress_to_folder(narrow)


def test_options_that_do_not_go_together(config: Callable[..., CompressConfig], tmp_path: Path) -> None:
    asked = make_budget(None, 4.0, "auto", None, False)
    with pytest.raises(RankwiseError, match=r"^method: ara; allowed: rankwise or global with bits_per_weight"):
        config("a", asked, rankwise.Ara())
    with pytest.raises(RankwiseError, match=r"^bits_per_weight: with scores; allowed: one of"):
        config("a", asked, scores=tmp_path)
    with pytest.raises(RankwiseError, match=r"^bits_per_weight: with precision"):
        config("a", asked, precision=Precision("nf4"))
    with pytest.raises(RankwiseError, match=r"^rounding: feedback with scores"):
        config("a", None, scores=tmp_path, rounding="feedback")
    with pytest.raises(RankwiseError, match=r"^rounding: up; allowed: feedback, nearest"):
        config("a", None, rounding="up")
    with pytest.raises(RankwiseError, match=r"^sides: one; allowed with a budget of bytes: two"):
        compress_to_folder(config("b", asked, rankwise.Global(sides="one")))


def test_what_a_budget_has_become_is_told() -> None:
    bits, size = (make_budget(*asked, "auto", None, False) for asked in ((None, 3.5), ("1KB", None)))
    assert bits is not None
    assert size is not None
    assert budget_met(bits, 3.4999, 77, 1e-3) == "3.5 bits for each number of the linear layers; asked for: 3.5"
    assert budget_met(size, 3.4, 1000, 1e-3) == "1000 bytes; asked for: at most 1000"
    assert "1.2% stay unused" in budget_met(size, 3.4, 988, 1e-3)
    assert "2.9% stay unused" in budget_met(bits, 3.4, 988, 1e-3)


def test_the_command(wide: Path, text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["compress", str(wide), "--out", str(tmp_path / "out"), "--size", "1.2MB", "--method", "global"]
    command += ["--calibration", str(text_file), "--measure", "1", "--seq-len", "32", "--samples", "4"]
    command += ["--gradient-samples", "2", "--keep", "*.layers.1.*_proj", "--json"]
    command += ["--embeddings", "int8", "--candidates", "2"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    told = capfd.readouterr()
    assert ended.value.code == 0, told.err
    facts = json.loads(told.out.splitlines()[-1])
    assert 1_180_000 < weight_bytes(tmp_path / "out") <= 1_200_000
    assert facts["bits"] < 32
    assert f"{weight_bytes(tmp_path / 'out')} bytes; asked for: at most 1200000" in told.err
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "out"), "--verify"])
    assert "model.embed_tokens: int8" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--ratio", "0.5"])
    assert "ratio: 0.5; allowed: left out with --size" in capfd.readouterr().err
