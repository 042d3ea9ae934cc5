"""Zero-shot accuracy of one checkpoint in memory and in lm-eval's `hf` and `vllm` backends, on the same questions.

    .venv-vllm/bin/python -m bench.lm_eval_backends --model small-60 --tasks-folder tasks --limit 150

Runs where vLLM is installed. In memory is `rankwise eval --tasks`; the backends are what `lm_eval run --model hf` and
`--model vllm` make of the folder. Each has a process of its own. Rows go to bench/results/cpu/backends.jsonl; the
command fails if an accuracy is further from the one in memory than its standard error.
"""

import argparse
import importlib.metadata
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import rankwise
from bench.sheet import append
from rankwise.engine.checkpoint import open_checkpoint
from rankwise.progress import on_terminal
from rankwise.provenance import versions
from rankwise.tasks import Scores, accuracy, load_tasks
from rankwise.zoo import TORCH_DTYPES, quiet_transformers

RESULTS = Path(__file__).parent / "results" / "cpu" / "backends.jsonl"
WAYS = ("in memory", "hf", "vllm")
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
METRICS = ("acc", "acc_norm")


def main() -> None:
    """Score the model in every way, print, write, compare."""
    options = parse()
    plan, _ = open_checkpoint(Path(options.model))
    facts: dict[str, Any] = {"bench": "backends", "model": plan.provenance.get("model"), "kept": plan.ratio}
    facts |= {"dtype": options.dtype, "limit": options.limit}
    rows = []
    for way in WAYS:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            rows.append(facts | pool.submit(scored, way, options).result())
        append(options.out, rows[-1])
        print(line(rows[-1]), flush=True)  # noqa: T201
    worst = max(distance(rows[0]["scores"], row["scores"]) for row in rows[1:])
    print(f"furthest from in memory: {worst:.2f} standard errors")  # noqa: T201
    if worst > 1:
        sys.exit(1)


def scored(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Scores in one of `WAYS`, in this process."""
    quiet_transformers()
    os.environ.update(SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        name_vllm(Path(folder))
        sys.path.append(folder)
        tasks = load_tasks(options.tasks, folder=options.tasks_folder, limit=options.limit)
        started = time.monotonic()
        scores = in_memory(tasks, options) if way == WAYS[0] else by_backend(way, tasks, options)
        seconds = round(time.monotonic() - started, 1)
        made_by = versions() | {name: importlib.metadata.version(name) for name in ("lm_eval", "vllm")}
    return {"way": way, "scores": scores, "seconds": seconds, "threads": torch.get_num_threads(), "versions": made_by}


def in_memory(tasks: dict[str, Any], options: argparse.Namespace) -> Scores:
    """As `rankwise eval --tasks`."""
    model, tokenizer = rankwise.load_model(options.model, options.dtype, "cpu")
    return accuracy(model, tokenizer, tasks, track=on_terminal)


def by_backend(name: str, tasks: dict[str, Any], options: argparse.Namespace) -> Scores:
    """As `lm_eval run --model NAME --model_args pretrained=MODEL`; it is enough that rankwise was imported."""
    from lm_eval.api.registry import get_model
    from lm_eval.evaluator import evaluate

    dtype = str(TORCH_DTYPES[options.dtype]).removeprefix("torch.")
    arguments = f"pretrained={options.model},dtype={dtype}"
    if name == "vllm":
        arguments += ",max_model_len=2048,enforce_eager=True"
    lm = get_model(name).create_from_arg_string(arguments, {"batch_size": 16, "device": "cpu"})
    found = evaluate(lm=lm, task_dict={"tasks": tasks}, log_samples=False)["results"]
    names = [key for metric in METRICS for key in (metric, f"{metric}_stderr")]
    plain = {task: {key: found[task].get(f"{key},none") for key in names} for task in tasks}
    return {task: {key: value for key, value in of.items() if value is not None} for task, of in plain.items()}


def name_vllm(folder: Path) -> None:
    """Metadata of a package `vllm` for lm-eval, which asks for its version, where the build for CPUs is installed.

    That one is named `vllm-cpu`, and vLLM itself takes what a package `vllm` is built for from its version.
    """
    try:
        version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    except importlib.metadata.PackageNotFoundError:
        return
    known = folder / f"vllm-{version}.dist-info"
    known.mkdir(parents=True, exist_ok=True)
    (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")


def distance(ours: Scores, theirs: Scores) -> float:
    """The largest difference of two accuracies, in standard errors of the first; of a single question, infinite."""
    found = [0.0]
    for task, score in ours.items():
        for metric in (metric for metric in METRICS if metric in score):
            gap, error = abs(score[metric] - theirs[task][metric]), score[f"{metric}_stderr"]
            found.append(gap / error if error else math.inf if gap else 0.0)
    return max(found)


def line(row: dict[str, Any]) -> str:
    """One line for a person."""
    scores = (f"{task} {' '.join(f'{of[m]:.4f}' for m in METRICS if m in of)}" for task, of in row["scores"].items())
    return f"{row['dtype']}  {row['way']:10} {'  '.join(scores)}  {row['seconds']:.0f} s"


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a rankwise folder")
    parser.add_argument("--tasks-folder", required=True, type=Path, help="a folder a task, see docs/zeroshot.md")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=["arc_easy", "piqa"])
    parser.add_argument("--limit", type=int, default=150, help="questions a task, from its start")
    parser.add_argument("--dtype", default="bf16", choices=sorted(TORCH_DTYPES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
