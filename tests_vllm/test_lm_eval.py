"""lm-eval's `hf` and `vllm` backends on one checkpoint give the same accuracies and likelihoods."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.lm_eval_backends import name_vllm

HF = "import rankwise; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
VLLM = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"  # vLLM finds rankwise by itself
QUESTIONS = [
    ("The capital of France is", ["Paris", "a fish", "seven", "Berlin"]),
    ("Water freezes at zero degrees", ["Celsius", "banana", "slowly on", "Paris"]),
    ("A list in Python can be sorted with the method", ["sort", "purple", "window", "rain"]),
    ("Monday is followed by", ["Tuesday", "a spoon", "October", "green"]),
    ("To open a file in Python, call", ["open()", "the police", "eleven", "a doctor"]),
    ("Two plus two equals", ["four", "grass", "Thursday", "loud"]),
]
TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{endings}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of six questions, the answer in another place each time."""
    rows = []
    for number, (context, endings) in enumerate(QUESTIONS):
        turned = endings[number % 4 :] + endings[: number % 4]
        rows.append({"ctx": context, "endings": turned, "label": turned.index(endings[0])})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    return tmp_path


def evaluated(code: str, backend: str, arguments: str, task: Path) -> tuple[dict[str, float], list[list[float]]]:
    """Accuracies, and each question's likelihoods."""
    name_vllm(task)
    words = f"run --model {backend} --model_args {arguments} --tasks local --include_path {task} --batch_size 4"
    out = ["--log_samples", "--output_path", str(task / backend)]
    environment = os.environ | {"PYTHONPATH": str(task), "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(task / "home")}
    command = [sys.executable, "-c", code, *words.split(), *out]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=task)
    assert done.returncode == 0, done.stderr[-4000:]
    [results] = (task / backend).rglob("results_*.json")
    [samples] = (task / backend).rglob("samples_*.jsonl")
    accuracies = json.loads(results.read_text())["results"]["local"]
    logged = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    likelihoods = [[float(answer[0]) for answer in row["filtered_resps"]] for row in logged]
    return {key: accuracies[f"{key},none"] for key in ("acc", "acc_norm")}, likelihoods


def test_both_backends_agree(smollm: Path, task: Path) -> None:
    ours, plain = evaluated(HF, "hf", f"pretrained={smollm},dtype=float32 --device cpu", task)
    options = "dtype=float32,enforce_eager=True,max_model_len=256,gpu_memory_utilization=0.5"
    theirs, served = evaluated(VLLM, "vllm", f"pretrained={smollm},{options}", task)
    assert ours == theirs
    assert len(plain) == len(QUESTIONS)
    for one, other in zip(plain, served, strict=True):
        assert one == pytest.approx(other, abs=2e-3)
