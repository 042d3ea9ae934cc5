"""How accuracies in memory and of lm-eval's backends are compared and tabulated; the backends run in tests_vllm."""

import json
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from bench import lm_eval_backends, sheet, tables


def scores(acc: float, normalised: float) -> dict[str, Any]:
    errors = {"acc_stderr": 0.04, "acc_norm_stderr": 0.05}
    return {"arc_easy": {"acc": acc, "acc_norm": normalised, **errors}, "piqa": {"acc": 0.6, "acc_stderr": 0.03}}


@pytest.mark.parametrize(
    ("acc", "normalised", "expected"), [(0.5, 0.4, 0.0), (0.52, 0.4, 0.5), (0.5, 0.3, 2.0), (0.44, 0.35, 1.5)]
)
def test_the_largest_difference_counts(acc: float, normalised: float, expected: float) -> None:
    """In standard errors of what was scored in memory: 0.04 and 0.05."""
    assert lm_eval_backends.distance(scores(0.5, 0.4), scores(acc, normalised)) == pytest.approx(expected)


def test_a_single_question_has_no_error() -> None:
    one = {"piqa": {"acc": 1.0, "acc_stderr": None}}
    assert lm_eval_backends.distance(one, one) == 0
    assert lm_eval_backends.distance(one, {"piqa": {"acc": 0.0, "acc_stderr": None}}) == float("inf")


def test_a_row_a_task_and_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu").mkdir()
    shared = {"model": "some-model", "kept": 0.6, "limit": 100, "dtype": "bf16", "seconds": 3.0, "versions": {"a": "1"}}
    rows = [shared | {"way": way, "scores": scores(0.5, 0.4)} for way in lm_eval_backends.WAYS]
    (tmp_path / "cpu" / "backends.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sheet, "RESULTS", tmp_path)
    table = tables.backends()
    assert "| task | measure | dtype | in memory | hf | vllm |" in table
    assert "| `arc_easy` | `acc_norm` | bf16 | 40.0% ± 5.0% | 40.0% ± 5.0% | 40.0% ± 5.0% |" in table
    assert table.count("| `piqa` |") == 1
    assert "The first 100 questions" in table
    assert lm_eval_backends.line(rows[0]).startswith("bf16  in memory  arc_easy 0.5000 0.4000  piqa 0.6000  3 s")


def test_lm_eval_finds_a_package_named_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_backends.importlib.metadata, "version", lambda name: "0.32.0")
    lm_eval_backends.name_vllm(tmp_path)
    [found] = distributions(path=[str(tmp_path)])
    assert (found.name, found.version) == ("vllm", "0.32.0+cpu")
