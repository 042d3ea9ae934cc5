"""Do model families keep their parameters in the same places? The rank maps of `global` at 80 %, side by side.

    python -m bench.studies.families --train wikitext-2-raw/train_1MB.txt --models embedded:smollm2-135m gemma.gguf

A row a model goes to bench/results/cpu/studies.families.jsonl; a model that is there is not measured again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

import rankwise
from bench.harness import RESULTS
from bench.sheet import append
from bench.studies.plots import figure
from rankwise.alloc.curvature import FORMAT
from rankwise.files import digest
from rankwise.progress import on_terminal
from rankwise.provenance import versions
from rankwise.text import read_text, take_windows, token_windows
from rankwise.zoo import EMBEDDED, load_model, quiet_transformers

OUT = RESULTS / "cpu" / "studies.families.jsonl"
GAP = 2  # columns between two maps


def main() -> None:
    """Measure the models that are missing, then draw."""
    options = parse()
    quiet_transformers()
    rows = [json.loads(line) for line in OUT.read_text(encoding="utf-8").splitlines()] if OUT.exists() else []
    for source in options.models:
        known = facts(source, options)
        if any(known.items() <= row.items() for row in rows):
            continue
        rows.append(known | measure(source, options))
        append(OUT, rows[-1])
    figure("rank-maps", lambda axes: draw(axes, rows), width=12)


def facts(source: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a row belongs to."""
    keys = ("ratio", "seq_len", "samples", "gradient_samples", "dtype")
    found = {"bench": "studies.families", "device": "cpu", "curvature": FORMAT, "versions": versions()}
    names = {"model": Path(source).name, "train": Path(options.train).name}
    return found | names | {key: getattr(options, key) for key in keys}


def measure(source: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model's shares, layer by layer."""
    model, tokenizer = load_model(source, options.dtype)
    every = token_windows(read_text(options.train), tokenizer, options.seq_len)
    windows = take_windows(every, options.samples, options.train)
    method, work = rankwise.Global(options.ratio), options.work / digest(source, 8)
    given: dict[str, Any] = {"gradient_text": windows[: options.gradient_samples], "work": work, "device": "cpu"}
    plan = rankwise.allocate(model, windows, method, track=on_terminal, **given)
    return {"shares": {name: round(spec.ratio, 4) for name, spec in plan}}


def rank_map(shares: dict[str, float]) -> tuple[list[str], np.ndarray]:
    """Names of layers within a block, and their shares `[layers, blocks]`."""
    blocks: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        parts = name.split(".")
        at = next(i for i, part in enumerate(parts) if part.isdigit())
        blocks.setdefault(parts[at], {})[".".join(parts[at + 1 :])] = share
    names = list(next(iter(blocks.values())))
    return names, np.array([[block[name] for block in blocks.values()] for name in names])


def draw(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """The maps in a row, layers of the same name at one height."""
    maps = [rank_map(row["shares"]) for row in rows]
    names = list(dict.fromkeys(name for own, _ in maps for name in own))
    width = sum(values.shape[1] for _, values in maps) + GAP * (len(maps) - 1)
    picture, at, middles = np.full((len(names), width), np.nan), 0, []
    for own, values in maps:
        picture[[names.index(name) for name in own], at : at + values.shape[1]] = values
        middles.append(at + values.shape[1] / 2 - 0.5)
        at += values.shape[1] + GAP
    image = axes.imshow(picture, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set(yticks=range(len(names)), yticklabels=names, xticks=middles, xticklabels=[row["model"] for row in rows])
    axes.figure.colorbar(image, ax=axes, label=f"share kept, {rows[0]['ratio']:.0%} of all")


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="text that calibrates")
    parser.add_argument("--models", nargs="+", default=[EMBEDDED])
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--gradient-samples", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--work", type=Path, default=Path("build/families"), help="curvature and factors")
    return parser.parse_args()


if __name__ == "__main__":
    main()
