"""What was measured as files: JSON lines, and figures."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankwise.errors import RankwiseError
from rankwise.figures import LIGHT, Theme, plain, to_png
from rankwise.files import disk_guard, json_ready

RESULTS = "bench.jsonl"
Row = Mapping[str, Any]
FIGURES = (  # file, key of the bar's length, key of the whisker's end, what is seen
    ("ttft", "ttft_ms_p50", "ttft_ms_p95", "Time to the first token, ms: median, whisker to p95; lower is better"),
    ("tpot", "tpot_ms_p50", "tpot_ms_p95", "Time between tokens, ms: median, whisker to p95; lower is better"),
    ("tokens", "tokens_per_s", None, "Output tokens a second: median, whisker p20 to p80; higher is better"),
    ("bandwidth", "mbu_percent", None, "Decoding, % of the measured memory bandwidth; whisker p20 to p80"),
)
UNDER_LOAD = (
    ("load-ttft", "ttft_ms", "Time to the first token under load, ms: p50, p95, p99"),
    ("load-tpot", "tpot_ms", "Time between tokens under load, ms: p50, p95, p99"),
    ("load-e2e", "e2e_ms", "Whole request under load, ms: p50, p95, p99"),
)
BAR = 0.34  # inches


def write_results(found: Mapping[str, Any], folder: Path) -> None:
    """Write `bench.jsonl`, a line a row, and PNG figures.

    Args:
        found: of `rankwise.bench.bench`.
        folder: made if it is not there.

    Raises:
        RankwiseError: it cannot be written.
    """
    memory = {"bandwidth_bytes_per_s": found["bandwidth_bytes_per_s"]}
    kinds = {"batch": found["rows"], "load": found["load"]}
    lines = [json.dumps(json_ready({"kind": kind, **row, **memory})) for kind, rows in kinds.items() for row in rows]
    draws: dict[str, Callable[[Theme], Figure]] = {
        name: partial(draw_shapes, title, found["rows"], key, whisker) for name, key, whisker, title in FIGURES
    }
    if found["load"]:
        draws |= {name: partial(draw_load, title, found["load"], key) for name, key, title in UNDER_LOAD}
    try:
        with disk_guard(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RESULTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            for name, draw in draws.items():
                (folder / f"{name}.png").write_bytes(to_png(draw, LIGHT))
    except OSError as error:
        raise RankwiseError("out", f"{folder} ({error.strerror})", "allowed: a folder that can be made") from None


def draw_shapes(title: str, rows: Sequence[Row], key: str, whisker: str | None, theme: Theme) -> Figure:
    """A bar a contestant, in groups by shape.

    Args:
        title: what is seen.
        rows: of all shapes and contestants, sorted by shape.
        key: of the bar's length, or of p20, p50 and p80.
        whisker: key of its upper end; None where `key` has it.
        theme: colours.
    """
    labels, lengths, ends = [], [], []
    for row in rows:
        low, middle, high = row[key] if whisker is None else (row[key], row[key], row[whisker])
        labels.append(f"batch {row['batch']}, prompt {row['prompt']}: {row['engine']}, {row['name']}")
        lengths.append(middle)
        ends.append((middle - low, high - middle))
    figure, axes = _axes(title, labels, theme)
    first = [row["engine"] == rows[0]["engine"] and row["name"] == rows[0]["name"] for row in rows]
    colours = [theme.accent if ours else theme.neutral for ours in first]
    error: dict[str, Any] = {"xerr": list(zip(*ends, strict=True)), "ecolor": theme.muted, "capsize": 2}
    axes.barh(range(len(rows)), lengths, color=colours, height=0.7, **error)
    return figure


def draw_load(title: str, rows: Sequence[Row], key: str, theme: Theme) -> Figure:
    """Three marks a contestant: p50, p95 and p99 of `key`."""
    figure, axes = _axes(title, [f"{row['engine']}, {row['name']}" for row in rows], theme)
    for place, row in enumerate(rows):
        values = [row[f"{key}_p{share}"] for share in (50, 95, 99)]
        axes.plot([0, values[-1]], [place, place], color=theme.rule, zorder=1)
        axes.scatter(values, [place] * 3, color=theme.accent if place == 0 else theme.neutral, zorder=2)
        for share, value in zip((50, 95, 99), values, strict=True):
            axes.annotate(f"p{share}", (value, place - 0.28), ha="center", fontsize=7, color=theme.muted)
    axes.set_xlim(left=0)
    return figure


def _axes(title: str, labels: Sequence[str], theme: Theme) -> tuple[Figure, Axes]:
    size = (9.4, 0.9 + BAR * max(len(labels), 2))
    figure = Figure(figsize=size, layout="constrained", facecolor=theme.background)
    axes = figure.add_subplot(facecolor=theme.background)
    axes.set_yticks(range(len(labels)), [plain(label, 70) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(length=0, labelcolor=theme.text, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.grid(axis="x", color=theme.rule, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_title(plain(title), loc="left", color=theme.text, fontsize=9.5)
    return figure, axes
