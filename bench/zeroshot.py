"""Zero-shot accuracy of several checkpoints on the same questions, by lm-eval.

    python bench/zeroshot.py --tasks-folder tasks --limit 200 \\
        --checkpoints dense=embedded:smollm2-135m global=out/global uniform=out/uniform

Takes the first questions of every task (docs/zeroshot.md says what the folder holds) and writes one JSON line a
model to bench/results/cpu/zeroshot.jsonl. Run again, it measures what is not there yet; a model counts as there
if its weights, the questions, the limit, the dtype and the versions are those of its line.
"""

import argparse
import hashlib
import importlib.metadata
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import rankwise.likelihood  # noqa: F401  imported here, so that the first task is not timed with it
from rankwise.errors import RankwiseError
from rankwise.files import atomic_write, sha256
from rankwise.plan import RankPlan
from rankwise.progress import on_terminal
from rankwise.provenance import versions
from rankwise.taskfiles import RECIPES, question_file
from rankwise.tasks import accuracy, load_tasks, mean_accuracy
from rankwise.zoo import EMBEDDED, load_model, local_folder, model_dtype, quiet_transformers, resolve_device

RESULTS = Path(__file__).parent / "results"
RUN = ("limit", "dtype", "device", "versions", "questions")  # what all lines of a file have in common


def main() -> None:
    """Measure every checkpoint that has no line yet."""
    options = parse()
    quiet_transformers()
    run = identity(options)
    if any(row[key] != run[key] for row in read(options.out) for key in RUN):
        raise RankwiseError("out", f"{options.out} is of another run", "another --out, or remove it")
    tasks = {name: load_tasks([name], folder=options.tasks_folder, limit=options.limit) for name in options.tasks}
    for name, source in options.checkpoints.items():
        weights = fingerprint(source, options.dtype)
        if any((row["name"], row["weights"]) == (name, weights) for row in read(options.out)):
            print(f"{name}: there already")  # noqa: T201
            continue
        row = run | {"name": name, "weights": weights, "ratio": kept(source)} | measure(source, tasks, options)
        write(options.out, [*(old for old in read(options.out) if old["name"] != name), row])


def measure(source: str, tasks: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Scores of one model, task by task, with the seconds each took: by the clock, and of processors."""
    model, tokenizer = load_model(source, options.dtype, options.device)
    scores: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    for name, task in tasks.items():
        started = time.monotonic(), time.process_time()
        scores |= accuracy(model, tokenizer, task, batch_size=options.batch_size, track=on_terminal)
        ended = time.monotonic(), time.process_time()
        seconds[name] = [round(end - start, 2) for start, end in zip(started, ended, strict=True)]
        print(f"{name:14} acc {scores[name]['acc']:.3f}  {seconds[name][0]:.0f} s")  # noqa: T201
    stored = {"stored": model_dtype(model), "threads": torch.get_num_threads()}
    return {**stored, "scores": scores, "mean": mean_accuracy(scores), "seconds": seconds}


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """What every row of a run carries."""
    command = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    files = {name: sha256(question_file(name, options.tasks_folder))[:16] for name in options.tasks}
    facts = {"bench": "zeroshot", "commit": commit, "device": resolve_device(options.device).type}
    made_by = versions() | {"lm_eval": importlib.metadata.version("lm-eval")}
    return {**facts, "dtype": options.dtype, "limit": options.limit, "questions": files, "versions": made_by}


def kept(source: str) -> float:
    """Share of the linear layers' parameters that a checkpoint keeps."""
    plan = (local_folder(source) or Path()) / "plan.json"
    return RankPlan.load(plan).ratio if plan.is_file() else 1.0


def fingerprint(source: str, dtype: str) -> str:
    """Hash of a model's weight files."""
    folder = local_folder(source, dtype)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if not files:
        raise RankwiseError("checkpoints", source, f"folders with safetensors files, or {EMBEDDED}")
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()[:16]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are there; read again each time, since another process may work on other checkpoints."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All lines at once, so that an interrupted run leaves whole ones."""

    def lines(part: Path) -> None:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    atomic_write(path, lines)
    means = rows[-1]["mean"]
    print(f"{rows[-1]['name']:38} acc {means['acc']:.3f}  acc_norm {means['acc_norm']:.3f}")  # noqa: T201


def pair(text: str) -> tuple[str, str]:
    """`name=source`."""
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(f"{text}: NAME=FOLDER is needed")
    return name, source


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", required=True, nargs="+", type=pair, metavar="NAME=FOLDER")
    parser.add_argument("--tasks-folder", required=True, type=Path, help="a folder a task, see docs/zeroshot.md")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(RECIPES), help="default: all eight")
    parser.add_argument("--limit", type=int, help="questions a task, from its start; default: all")
    parser.add_argument("--batch-size", type=int, help="choices side by side; default: 16 on a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "zeroshot.jsonl")
    options = parser.parse_args()
    options.checkpoints = dict(options.checkpoints)
    return options


if __name__ == "__main__":
    main()
