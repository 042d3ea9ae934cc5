"""`rankwise report` of several models: who stands in it, and what is said when one of them fails."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise import reporting
from rankwise.cli import main
from rankwise.jobs import JOB, work_folder

JOB_OPTIONS = ["--samples", "2", "--gradient-samples", "1", "--seq-len", "32", "--rank-multiple", "1", "--measure", "0"]
Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def dense(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def small(dense: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed checkpoint."""
    out = tmp_path_factory.mktemp("reporting") / "small"
    options = ["--calibration", str(text_file), "--method", "uniform", "--ratio", "0.6", *JOB_OPTIONS]
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(dense), "--out", str(out), *options])
    assert ended.value.code == 0
    return out


@pytest.fixture
def page(small: Path, text_file: Path, tmp_path: Path) -> list[str | Path]:
    """The command, without what stands beside the checkpoint."""
    options = ["--text", text_file, "--windows", "2", "--seq-len", "32", "--device", "cpu", "--no-speed"]
    return ["report", small, "--out", tmp_path / "page", *options]


def test_models_beside_it_are_measured_alike_and_drawn(
    page: list[str | Path], small: Path, dense: Path, tmp_path: Path, run: Run
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    twice = ["--beside", copy, "--beside", f"{copy}/", "--beside", dense]
    rows = json.loads(run(*page, *twice, "--json")[0])["rows"]
    assert [row["name"] for row in rows] == [str(dense), str(small), str(copy)]
    assert rows[1]["perplexity"] == rows[2]["perplexity"]
    assert rows[1]["text"] == rows[2]["text"]
    html = (tmp_path / "page" / "index.html").read_text()
    assert f"Diamond: {dense}, with which the others are compared." in html
    assert "→" in html  # the headline: it is known which of the two equal rows the plan made
    assert (tmp_path / "page" / "tradeoff-dark.png").is_file()


def test_two_models_have_no_tradeoff(page: list[str | Path], tmp_path: Path, run: Run) -> None:
    run(*page)
    assert not (tmp_path / "page" / "tradeoff-light.png").exists()


def test_what_is_not_there_is_refused_before_anything_is_measured(
    page: list[str | Path], small: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "quality", lambda *_: pytest.fail("measured"))
    _, err = run(*page, "--beside", tmp_path / "nowhere", code=2)
    assert err.startswith(f"error: model: {tmp_path / 'nowhere'} (no such folder); allowed: ")
    (tmp_path / "empty").mkdir()
    _, err = run(*page, "--beside", tmp_path / "empty", code=2)
    assert err.startswith(f"error: model: {tmp_path / 'empty'} (no config.json in it); allowed: ")
    torn = tmp_path / "torn"
    shutil.copytree(small, torn)
    (torn / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes()[:1000])
    _, err = run(*page, "--beside", torn, code=2)
    assert str(torn) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "page").exists()


def test_an_interrupted_compression_is_called_so(page: list[str | Path], tmp_path: Path, run: Run) -> None:
    begun = tmp_path / "begun"
    work_folder(begun).mkdir()
    (work_folder(begun) / JOB).write_text("{}")
    line = f"error: model: {begun} (its compression was interrupted); the same `rankwise compress` goes on\n"
    assert run(*page, "--beside", begun, code=2)[1] == line
    assert run("report", begun, code=2)[1] == line


def test_a_failing_model_is_named(page: list[str | Path], small: Path, tmp_path: Path, run: Run) -> None:
    short = tmp_path / "short"
    shutil.copytree(small, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 16}
    (short / "config.json").write_text(json.dumps(config))
    _, err = run(*page, "--beside", short, code=2)
    assert err.splitlines()[-1] == f"error: seq_len: 32 ({short}); allowed: at most 16, the model's context"
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("kind", ["interrupted", "memory"])
def test_what_ends_the_measuring_says_where(
    kind: str, page: list[str | Path], small: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def end(models: list[str], *_: Any) -> list[dict[str, Any]]:
        if models == [str(small)]:
            raise KeyboardInterrupt if kind == "interrupted" else torch.OutOfMemoryError("full")
        return []

    monkeypatch.setattr(reporting, "quality", end)
    _, err = run(*page, code=130 if kind == "interrupted" else 2)
    said = f"{small}: interrupted while it was measured" if kind == "interrupted" else f"its memory is full ({small})"
    assert said in err
    assert not (tmp_path / "page").exists()
