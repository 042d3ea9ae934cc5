"""Perplexity against bytes as a figure: docs/tradeoff.svg from the rows of `bench.tradeoff`."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.studies.plots import save

ROOT = Path(__file__).parent.parent
ROWS, OUT = ROOT / "bench" / "results" / "cpu" / "tradeoff.jsonl", ROOT / "docs" / "tradeoff.svg"
CHOSEN = ("chosen together, channels too", "chosen together", "ranks, then int4 by 64")
CURVES = (*CHOSEN, "pivot and dense, bf16", "lowrank and dense, bf16")


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A panel a test text, logarithmic perplexity; whole models in one precision are single points."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, test in zip(panels, ("wikitext2", "c4"), strict=True):
        for name in CURVES:
            own = sorted((row["share"], row["perplexity"][test]) for row in rows if row["name"] == name)
            if own:
                axes.plot(*zip(*own, strict=True), marker="o", markersize=4, label=name)
        for row in rows:
            if row["name"] not in CURVES and "share" in row:
                way = "fed back" if row["rounding"] == "feedback" else "nearest"
                name = f"{row['name'].removesuffix(', nearest')}, {way}"
                axes.plot(row["share"], row["perplexity"][test], linestyle="", marker="x", label=name)
        dense = next(row["perplexity"][test] for row in rows if row["name"] == "dense")
        axes.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense, bf16")
        axes.set(title=test, xlabel="bytes of the linear layers, share of bf16", ylabel="perplexity", yscale="log")
    panels[1].legend(fontsize=7, loc="upper right")
    return figure


def main() -> None:
    """Draw the rotated model's rows."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    save(draw([row for row in rows if not row["plain"]]), OUT)


if __name__ == "__main__":
    main()
