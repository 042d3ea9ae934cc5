"""`rankwise serve --engine vllm` up to the moment when vLLM takes over; vLLM itself is not needed here."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fourbit import in_turn, wide_model

import rankwise
from rankwise import cli
from rankwise.engine.doors.vllm import launch
from rankwise.errors import RankwiseError
from rankwise.storage import Precision

WINDOWS = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))


def refused(*arguments: str) -> str:
    """What the command says."""
    with pytest.raises(RankwiseError) as raised:
        cli.app(["serve", *arguments], standalone_mode=False)
    return str(raised.value)


@pytest.fixture
def taken_over(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """vLLM is there, and notes what it is started with."""
    started: list[list[str]] = []

    def start(program: str, arguments: list[str]) -> None:
        assert program == sys.executable
        started.append(arguments[1:])
        raise SystemExit(0)

    monkeypatch.setattr(launch, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "execv", start)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv(launch.KV_SPACE, raising=False)
    return started


def test_what_vllm_is_told(model_folder: Callable[[str], Path], taken_over: list[list[str]]) -> None:
    folder = str(model_folder("llama"))
    options = ["--engine", "vllm", "--name", "it", "--port", "9", "--api-key", "k", "--no-prefix-caching"]
    with pytest.raises(SystemExit):
        cli.app(["serve", folder, *options, "--", "--enforce-eager", "-tp", "1"], standalone_mode=False)
    [arguments] = taken_over
    assert arguments[:2] == ["-m", "rankwise.engine.doors.vllm.refusals"]
    told = dict(zip(arguments[2:16:2], arguments[3:17:2], strict=True))
    assert told == {
        "--model": folder,
        "--served-model-name": "it",
        "--host": "127.0.0.1",
        "--port": "9",
        "--max-num-seqs": "64",
        "--max-model-len": "128",  # the model's own
        "--dtype": "float32",  # as stored
    }
    assert arguments[16:] == ["--no-enable-prefix-caching", "--enforce-eager", "-tp", "1"]
    assert "k" not in arguments
    assert os.environ.pop("VLLM_API_KEY") == "k"
    assert os.environ.pop(launch.KV_SPACE) == "4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "onnx"], "engine: onnx; allowed: rankwise, vllm"),
        (["--engine", "vllm", "--grace", "3"], "--grace: given with --engine vllm; an option of rankwise's own engine"),
        (["--engine", "vllm", "--draft", "x"], "--draft: given with --engine vllm"),
        (["--engine", "vllm", "--json"], "--json: given with --engine vllm"),
        (["--", "--enforce-eager"], "argument: --enforce-eager; options after -- are for --engine vllm"),
    ],
)
def test_refused(options: list[str], message: str) -> None:
    assert message in refused("any", *options)


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert "engine: vllm (not installed); pip install 'rankwise[vllm]'" in refused("any", "--engine", "vllm")


def test_no_such_folder(taken_over: list[list[str]], tmp_path: Path) -> None:
    assert "no such folder" in refused(str(tmp_path / "none"), "--engine", "vllm")
    assert not taken_over


@pytest.mark.parametrize(
    ("words", "ranks"), [(["-tp", "2"], 2), (["--tensor_parallel_size=4"], 4), (["--seed", "2"], 1)]
)
def test_how_many_ranks(words: list[str], ranks: int) -> None:
    assert launch.tensor_parallel(words) == ranks


@pytest.mark.parametrize("words", [["-tp", "0"], ["-tp"], ["--tensor-parallel-size=two"]])
def test_no_number_of_ranks(words: list[str]) -> None:
    with pytest.raises(RankwiseError, match="allowed: a whole number from 1"):
        launch.tensor_parallel(words)


def test_groups_that_ranks_would_cut(tmp_path: Path, taken_over: list[list[str]]) -> None:
    """Inputs of 256 and 384 in groups of 64: four ranks cannot have whole groups of 384, three cannot of 256."""
    model: Any = wide_model()
    plan = in_turn(rankwise.allocate(model, WINDOWS, rankwise.Uniform(ratio=0.6, rank_multiple=1)), [Precision("nf4")])
    folder = rankwise.save(rankwise.compress(model, plan), None, plan, tmp_path / "small")
    launch.require_split(folder, 2)
    line = refused(str(folder), "--engine", "vllm", "--", "--tensor-parallel-size", "4")
    assert line.startswith("tensor_parallel_size: 4 (in_features 384 stored as nf4); ")
    assert "mlp.down_proj" in line
    assert not taken_over
