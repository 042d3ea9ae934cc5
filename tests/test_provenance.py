"""What a job is, and what a plan says of its making: all that decides the bytes, and neither time nor host."""

import importlib.metadata
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rankwise
from rankwise.alloc.methods import Ara, Global, Rankwise
from rankwise.config import CompressConfig, TextConfig
from rankwise.provenance import identify_job, provenance, versions


@pytest.fixture
def command(tmp_path: Path) -> CompressConfig:
    return CompressConfig("model", tmp_path / "out", Rankwise(0.7), TextConfig("a.txt", learn="b.txt"))


def test_everything_that_decides_the_bytes_is_part_of_a_job(command: CompressConfig, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "scores.json").write_text('{"format": 1, "options": {"lr": 0.1}}')
    changes: list[dict[str, Any]] = [
        {"model": "other"},
        {"method": Rankwise(0.6)},
        {"method": Global(0.7)},
        {"method": Ara(0.7, steps=3)},
        {"method": Ara(0.7, steps=4)},
        {"text": replace(command.text, learn="c.txt")},
        {"text": replace(command.text, learn_samples=3)},
        {"text": replace(command.text, seed=3)},
        {"refit": False},
        {"heal": 3},
        {"heal": 4},
        {"score_only": True},
        {"scores": tmp_path / "scores"},
        {"plan": tmp_path / "plan.json"},
        {"curvature": tmp_path},
    ]
    found = [identify_job(replace(command, **change), "bf16") for change in [{}, *changes]]
    found += [identify_job(command, "fp16")]
    assert len({json.dumps(one) for one in found}) == len(changes) + 2
    assert all(json.loads(json.dumps(one)) == one for one in found)


def test_what_does_not_decide_them_is_not(command: CompressConfig, tmp_path: Path) -> None:
    same: list[dict[str, Any]] = [
        {"out": tmp_path / "elsewhere"},
        {"device": "cpu"},
        {"restart": True},
        {"refit": True},  # the method's own choice, said aloud
        {"text": replace(command.text, measure=9)},
    ]
    assert all(identify_job(replace(command, **change), "bf16") == identify_job(command, "bf16") for change in same)


def test_scores_that_were_made_anew_are_another_job(command: CompressConfig, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text('{"format": 1, "options": {"lr": 0.1}}')
    first = identify_job(replace(command, scores=tmp_path), "bf16")
    path.write_text('{"format": 1, "options": {"lr": 0.2}}')
    assert identify_job(replace(command, scores=tmp_path), "bf16") != first


def test_a_plan_says_how_it_was_made(command: CompressConfig, tmp_path: Path) -> None:
    known = provenance(command, {"model": "1f"}, "bf16")
    assert known["options"]["method"] == "rankwise"
    assert known["curvature"] == {"model": "1f"}
    assert known["calibration"]["learn"] == "b.txt"
    assert known.keys() == {"model", "weights", "options", "calibration", "curvature", "versions"}
    (tmp_path / "plan.json").write_text("{}")
    given = provenance(replace(command, plan=tmp_path / "plan.json"), {}, "bf16")
    assert given["options"] == {"method": "plan", "sides": "two"}


def test_a_source_tree_that_is_not_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version

    def elsewhere(name: str) -> str:
        if name == "rankwise":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", elsewhere)
    assert versions()["rankwise"] == rankwise.__version__


def test_the_package_and_the_project_say_the_same_version() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == rankwise.__version__
