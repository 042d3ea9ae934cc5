"""The bench of the runtime, run for real on tiny models."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.runtime import figures, line


def test_ratios_are_taken_within_a_round() -> None:
    rows = [
        {"engine": "transformers", "name": "a", "tokens_per_s_by_round": [4.0, 2.0, 1.0]},
        {"engine": "rankwise", "name": "a", "tokens_per_s_by_round": [8.0, 4.0, 2.0]},
        {"engine": "rankwise", "name": "b", "tokens_per_s_by_round": [8.0, 8.0, 8.0]},
    ]
    found = figures(rows, "b")
    assert found["ratios"]["runtime / transformers"] == [2.0, 2.0, 2.0]
    assert found["ratios"]["runtime, compressed / runtime"][1] == 2.0
    assert found["ratios"]["runtime, compressed / transformers"][1] == 4.0
    assert found["tokens_per_second"]["runtime"][1] == 4.0
    assert "runtime / transformers 2.00" in line({"batch": 4} | found)


def test_the_bench_runs_and_its_rows_make_a_table(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cpu" / "runtime.jsonl"
    options = ["--model", model_folder("llama"), "--prompt", "8", "--new", "4", "--rounds", "2"]
    more = ["--dtype", "fp32", "--batch", "1", "--batch", "3", "--compressed", model_folder("qwen2"), "--out", out]
    command = [sys.executable, "-m", "bench.runtime", *map(str, [*options, *more])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert [row["batch"] for row in rows] == [1, 3]
    assert list(rows[0]["tokens_per_second"]) == ["transformers", "runtime", "runtime, compressed"]
    assert all(value > 0 for row in rows for rates in row["tokens_per_second"].values() for value in rates)
    from bench import sheet, tables

    monkeypatch.setattr(sheet, "RESULTS", tmp_path)
    assert "| 3 |" in tables.runtime()
