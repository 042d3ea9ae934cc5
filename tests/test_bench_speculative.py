"""The bench of speculative decoding, run for real on a tiny model that drafts for itself."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def test_the_bench_runs_and_writes_a_row(model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "rows.jsonl", model_folder("llama")
    options = ["--text", text_file, "--model", model, "--draft", model, "--dtype", "fp32", "--out", out]
    sizes = ["--prompts", 3, "--prompt", 8, "--new", 11, "--draft-tokens", 4]
    command = [sys.executable, "-m", "bench.speculative", *map(str, [*options, *sizes])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [row] = [json.loads(row) for row in out.read_text().splitlines()]
    assert (row["equal"], row["acceptance"], row["tokens_per_check"], row["kept"]) == (3, 1.0, 5.0, None)
    assert len(row["ratio"]) == 3
    assert row["tokens_per_second"].keys() == {"alone", "drafting"}
    assert "3 of 3 outputs equal  acceptance 100.0%" in done.stdout
