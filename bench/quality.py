"""Perplexity of every method at every ratio: one model, one text, one run.

    python bench/quality.py --train wikitext-2-raw/train_1MB.txt --test wikitext-2-raw/test.txt

Calibrates on the first windows of the train text (the first of them for output gradients, too), tests on the first
windows of the test text, and writes one JSON line a row to bench/results/cpu/quality.jsonl. With `--work DIR`
curvature and factors are kept, and an interrupted run continues from them.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.sheet import append
from rankwise.alloc.curvature import FORMAT, collect
from rankwise.alloc.methods import Global, Method, Uniform
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.evaluate import perplexity
from rankwise.pipeline import compress
from rankwise.progress import on_terminal
from rankwise.provenance import versions
from rankwise.text import read_text, take_windows, token_windows
from rankwise.zoo import EMBEDDED, load_model, model_dtype, quiet_transformers

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure every row."""
    options = parse()
    quiet_transformers()
    device = torch.device("cpu")
    model, tokenizer = load_model(options.model, options.dtype)
    train = token_windows(read_text(options.train), tokenizer, options.seq_len)
    inputs = take_windows(train, max(options.samples, options.gradient_samples), options.train)
    inputs, gradients = inputs[: options.samples], inputs[: options.gradient_samples]
    test = token_windows(read_text(options.test, "test"), tokenizer, options.seq_len)
    test = take_windows(test, options.windows, options.test)
    run = identity(options, model_dtype(model))
    work = options.work or Path(tempfile.mkdtemp(prefix="rankwise-quality-"))
    part = options.out.with_suffix(".part")
    part.unlink(missing_ok=True)
    started = time.monotonic()
    curvature = collect(model, inputs, gradients, work / "curvature", device=device, track=on_terminal)
    stores = {
        sides: factorize_model(
            model, curvature, work / f"factors-{sides}", sides=sides, device=device, track=on_terminal
        )
        for sides in ("one", "two")
    }
    write(part, run | {"name": "dense", "ratio": 1.0, "perplexity": perplexity(model, test, track=on_terminal)})
    for name, method in entries(options.ratios, options.rank_multiple):
        write(part, run | measure(name, method, stores, test, options))
    part.replace(options.out)
    print(f"{time.monotonic() - started:.0f} s, written to {options.out}")  # noqa: T201


def entries(ratios: list[float], multiple: int) -> Iterator[tuple[str, Method]]:
    """What is compared: a name and a method."""
    for ratio in ratios:
        for sides in ("one", "two"):
            yield f"uniform, {sides}-sided, lowrank", Uniform(ratio, ("lowrank",), multiple, sides=sides)
        for sides in ("one", "two"):
            yield f"uniform, {sides}-sided, pivot", Uniform(ratio, ("pivot",), multiple, sides=sides)
        yield "global, two-sided, lowrank or dense", Global(ratio, ("dense", "lowrank"), multiple)
        yield "global, two-sided, all kinds", Global(ratio, rank_multiple=multiple)


def measure(
    name: str, method: Method, stores: dict[str, FactorStore], test: torch.Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: a fresh model, compressed and evaluated."""
    model, _ = load_model(options.model, options.dtype)
    plan = method.allocate(stores[str(method.sides)], model_dtype(model))
    compress(model, plan, stores[str(method.sides)])
    loss = [spec.loss for _, spec in plan if spec.loss is not None]
    return {
        "name": name,
        "ratio": method.ratio,
        "measured_ratio": plan.ratio,
        "perplexity": perplexity(model, test, track=on_terminal),
        "predicted_loss": sum(loss) if loss else None,
        "kinds": plan.counts(),
        "options": method.options(),
    }


def identity(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """What every row of a run carries."""
    command = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    keys = ("model", "samples", "gradient_samples", "seq_len", "windows")
    texts = {"train": Path(options.train).name, "test": Path(options.test).name}
    facts = {
        "bench": "quality",
        "curvature": FORMAT,
        "commit": commit.stdout.strip() or "unknown",
        "device": "cpu",
        "dtype": dtype,
    }
    return {**facts, "versions": versions(), **texts, **{key: getattr(options, key) for key in keys}}


def write(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and say what it holds."""
    append(path, row)
    print(f"{row['name']:38} kept {row['ratio']:.2f}  perplexity {row['perplexity']:.2f}")  # noqa: T201


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--train", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--gradient-samples", type=int, default=24)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--ratios", type=lambda text: [float(part) for part in text.split(",")], default=[0.8, 0.6])
    parser.add_argument("--rank-multiple", type=int, default=8)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--work", type=Path, help="keep curvature and factors here, to continue or to reuse")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "quality.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
