"""Perplexity against bytes as a figure: docs/tradeoff.svg from the rows of `bench.tradeoff`."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.byte_tables import BESIDE, TOGETHER
from bench.studies.plots import save

ROOT = Path(__file__).parent.parent
ROWS, OUT = ROOT / "bench" / "results" / "cpu" / "tradeoff.jsonl", ROOT / "docs" / "tradeoff.svg"
CURVES = (*TOGETHER, "ranks, then int8", "ranks, then int4 by 64", *BESIDE)
THEIRS = "nf4, nearest"  # has bitsandbytes' codes, see `bench.bnb`


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A panel a test text, logarithmic perplexity; whole models in one precision are single points."""
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, test in zip(panels, ("wikitext2", "c4"), strict=True):
        for name in CURVES:
            own = sorted((row["share"], row["perplexity"][test]) for row in rows if row["name"] == name)
            if own:
                axes.plot(*zip(*own, strict=True), marker="o", markersize=4, label=name)
        points = [row for row in rows if row["name"] not in CURVES and "share" in row]
        for number, row in enumerate(points):
            marker, colour = ("v" if row["rounding"] == "nearest" else "x"), f"C{number % 10}"
            axes.plot(row["share"], row["perplexity"][test], marker, color=colour, markersize=5, label=titled(row))
        dense = next(row["perplexity"][test] for row in rows if row["name"] == "dense")
        axes.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense, bf16")
        axes.set(title=test, xlabel="bytes of the linear layers, share of bf16", ylabel="perplexity", yscale="log")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    return figure


def titled(row: dict[str, Any]) -> str:
    """What the legend says of a whole model in one precision."""
    if row["name"] == THEIRS:
        return f"{THEIRS} (bitsandbytes' codes)"
    return row["name"] if row["rounding"] == "nearest" else f"{row['name']}, fed back"


def main() -> None:
    """Draw the rotated model's rows."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    save(draw([row for row in rows if not row["plain"]]), OUT)


if __name__ == "__main__":
    main()
