"""The bench of vLLM and the runtime, run for real: four processes in turn, and the table made of their rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = "embedded:python-docs-test"
NAMES = ["runtime", "vLLM", "runtime, compressed", "vLLM, compressed"]
PAIRS = [
    "vLLM, compressed / vLLM",
    "runtime / vLLM",
    "runtime, compressed / vLLM, compressed",
    "runtime, compressed / runtime",
]


def test_four_take_turns(smollm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "cpu" / "vllm.jsonl"
    words = ["--prompt", "8", "--new", "4", "--rounds", "1", "--batch", "1", "--batch", "2", "--dtype", "fp32"]
    command = [sys.executable, "-m", "bench.vllm_speed", "--compressed", str(smollm), "--text", TEXT, *words]
    environment = os.environ | {"VLLM_CPU_CI_ENV": "1"}  # nothing is compiled, which takes a minute
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        assert list(row["tokens_per_second"]) == NAMES
        assert list(row["ratios"]) == PAIRS
        assert all(value > 0 for rates in row["tokens_per_second"].values() for value in rates)
        assert row["versions"]["vllm"].startswith("0.32")
        assert row["device"].startswith("CPU, ")
    from bench import tables

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| 2 |" in tables.vllm()
