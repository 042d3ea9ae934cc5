"""The report: one self-contained HTML page, and its figures as PNG files beside it."""

import base64
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

import rankwise
from rankwise.errors import RankwiseError
from rankwise.figures import THEMES, Grid, Theme, bars, energy_map, limits, make_grid, mixed, rank_map, to_png
from rankwise.files import disk_guard, publish
from rankwise.plan import RankPlan

PAGE = "index.html"
NOT_MEASURED = "not measured"
TEXTS = ("name", "text", "device")
COLUMNS = (  # heading, key of a row, key of a second number below the first
    ("Kept share", "ratio", None),
    ("Size", "weight_bytes", None),
    ("Perplexity", "perplexity", None),
    ("Decode, tokens/s", "tokens_per_s", None),
    ("Decode latency", "decode_ms_p50", "decode_ms_p95"),
    ("Prefill latency", "prefill_ms_p50", "prefill_ms_p95"),
    ("Peak memory", "peak_bytes", None),
)
TIMED = [key for _, key, _ in COLUMNS[3:]]
NUMBERS = [key for _, first, second in COLUMNS for key in (first, second) if key]
BARS = (  # file, key of a row, what is seen
    ("perplexity", "perplexity", "Perplexity; lower is better"),
    ("size", "weight_bytes", "Size of the weights; smaller is better"),
    ("decode", "tokens_per_s", "Decode, tokens per second; higher is better"),
    ("prefill", "prefill_ms_p50", "Prefill latency, median; lower is better"),
)
QUALITY = {"text": "{}"}  # keys of a row that say how its numbers were measured
SPEED = {
    "device": "{}",
    "dtype": "{}",
    "prompt": "prompt of {} tokens",
    "new_tokens": "{} new tokens",
    "batch": "batch {}",
    "rounds": "{} rounds",
}
CONDITIONS = {"ratio": {}, "weight_bytes": {}, "perplexity": QUALITY}  # of any other number: SPEED
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Args:
        name: of its files, without theme and suffix.
        caption: one line: what is seen, and the settings.
        alt: the same, with the numbers, for those who cannot see it.
        draw: makes the figure for a theme.
        wide: takes the page's whole width.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[Theme], Figure]
    wide: bool = False


def write_report(plan: RankPlan, rows: Sequence[Row], folder: str | Path, *, title: str) -> Path:
    """Write a page that shows what a plan made of a model, and what was measured.

    Args:
        plan: its provenance is printed whole.
        rows: one mapping a model, the dense one first. Keys, each of which may be missing or None: `name`, `ratio`,
            `weight_bytes`, `perplexity`, `text` (what the perplexity was measured on), `prefill_ms_p50`,
            `prefill_ms_p95`, `decode_ms_p50`, `decode_ms_p95`, `tokens_per_s`, `peak_bytes`, and how the times were
            taken: `device`, `dtype`, `prompt`, `new_tokens`, `batch`, `rounds`. Other keys are not looked at.
        folder: must not exist; gets `index.html` and `<figure>-<theme>.png`.
        title: the page's heading.

    Returns:
        The path of `index.html`.

    Raises:
        RankwiseError: the folder exists or cannot be written, or a value is of the wrong kind.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise RankwiseError("folder", str(folder), "allowed: a folder that does not exist yet")
    _check(plan, rows)
    pictures = [*map_pictures(plan), *bar_pictures(rows)]
    images = {f"{p.name}-{theme.name}.png": to_png(p.draw, theme) for p in pictures for theme in THEMES}
    page = _render(plan, rows, title, pictures, images)
    try:
        with disk_guard(folder):
            _write({**images, PAGE: page.encode("utf-8", "replace")}, folder)
    except OSError as error:
        raise RankwiseError("folder", f"{folder} ({error.strerror})", "allowed: a folder that can be made") from None
    return folder / PAGE


def map_pictures(plan: RankPlan) -> list[Picture]:
    """The rank map, and the energy map if energies are known; none if no module lies in a block."""
    pictures = []
    ranks = make_grid(plan.layers, lambda spec: spec.ratio)
    energies = make_grid(plan.layers, lambda spec: spec.energy)
    if ranks.rows:
        what = f"Kept share of parameters by module type and block; {share(plan.ratio)} over all modules"
        pictures.append(_map_picture("rank_map", what, ranks, rank_map))
    if np.isfinite(energies.shown).any():
        what = "Kept share of the energy, in the metric of the calibration text, by module type and block"
        pictures.append(_map_picture("energy_map", what, energies, energy_map))
    return pictures


def bar_pictures(rows: Sequence[Row]) -> list[Picture]:
    """A bar figure for every quantity that was measured for at least two models."""
    pictures = []
    names = [_name(row) for row in rows]
    for name, key, what in BARS:
        values = [row.get(key) for row in rows]
        if sum(value is not None and math.isfinite(value) for value in values) < 2:
            continue
        labels = [show(key, row, rows) for row in rows]
        alt = f"{what}. " + ", ".join(f"{n}: {label}" for n, label in zip(names, labels, strict=True)) + "."
        setting = _setting(rows, key)
        caption = f"{what}; {setting}." if setting else f"{what}."
        pictures.append(Picture(name, caption, alt, partial(bars, what, names, values, labels)))
    return pictures


def sections(provenance: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Nested data as headed lists of dotted names and values; what is not nested comes first, without a head."""
    nested = {key: value for key, value in provenance.items() if isinstance(value, Mapping) and value}
    flat = {key: value for key, value in provenance.items() if key not in nested}
    parts = [("", flat), *nested.items()] if flat else list(nested.items())
    return [(str(head), list(_leaves(part))) for head, part in parts]


def share(value: float | None) -> str:
    """0.8 as `80.0%`, with more digits close to 1, where rounding would claim that nothing is lost."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{math.floor(value * 1e4) / 1e2:.2f}%" if 0.9995 <= value < 1 else f"{value:.1%}"


def loss(value: float | None) -> str:
    """A predicted loss, which may be tiny."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.2e}" if value else "0"


def show(key: str, row: Row, rows: Sequence[Row]) -> str:
    """A row's number with its unit; bytes in the unit of the largest of all rows."""
    value = row.get(key)
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not finite"
    if key == "ratio":
        return share(value)
    if key.endswith("_bytes"):
        largest = max(other.get(key) or 0 for other in rows)
        return f"{value / 1e9:.2f} GB" if largest >= 1e9 else f"{value / 1e6:.1f} MB"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2
    return f"{value:,.{digits}f}" + (" ms" if "_ms_" in key else "")


def _render(
    plan: RankPlan, rows: Sequence[Row], title: str, pictures: Sequence[Picture], images: Mapping[str, bytes]
) -> str:
    loader = PackageLoader("rankwise", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(share=share, loss=loss)
    losses = [math.nan if spec.loss is None else spec.loss for _, spec in plan]
    return environment.get_template("report.html.j2").render(
        title=title,
        version=rankwise.__version__,
        themes={theme.name: theme for theme in THEMES},
        facts=_facts(plan, rows),
        columns=["Model", *(heading for heading, _, _ in COLUMNS)],
        table=[_cells(row, rows) for row in rows],
        settings=[("Perplexity", _setting(rows, "perplexity")), ("Speed and memory", _setting(rows, *TIMED))],
        pictures=pictures,
        sources={name: base64.b64encode(png).decode("ascii") for name, png in images.items()},
        sizes={name: struct.unpack(">II", png[16:24]) for name, png in images.items()},
        plan=plan,
        total_loss=sum(losses),
        provenance=sections(plan.provenance),
    )


def _check(plan: RankPlan, rows: Sequence[Row]) -> None:
    if not plan.layers:
        raise RankwiseError("plan", "no layers in it", "a plan lists every linear layer of the blocks")
    for name, spec in plan:
        _check_number(f"plan: {name}.energy", spec.energy)
        _check_number(f"plan: {name}.loss", spec.loss)
    for index, row in enumerate(rows):
        for key, value in row.items():
            if key in NUMBERS:
                _check_number(f"rows[{index}].{key}", value)
            elif key in TEXTS and not isinstance(value, str | None):
                raise RankwiseError(f"rows[{index}].{key}", value, "allowed: text, or None")


def _check_number(field: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
        raise RankwiseError(field, value, "allowed: a number, or None")


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        for name, content in files.items():
            (staged / name).write_bytes(content)
        staged.chmod(0o755)  # mkdtemp's folders are open to their owner alone
        publish(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _map_picture(name: str, what: str, grid: Grid, draw: Callable[[Grid, Theme], Figure]) -> Picture:
    shown, dense = grid.shown, grid.kinds == "dense"
    caption = f"{what}."
    alt = f"{what}. {len(grid.rows)} module types in {len(grid.columns)} blocks; modules left dense: {dense.sum()}."
    if np.isfinite(shown).any():
        ends = [np.unravel_index(find(shown), shown.shape) for find in (np.nanargmin, np.nanargmax)]
        low, high = (f"{share(shown[y, x])} ({grid.rows[y]} of block {grid.columns[x]})" for y, x in ends)
        alt += f" Compressed modules keep from {low} to {high}."
        if limits(shown)[0] > shown[ends[0]]:
            caption += " Colours start at the 5th percentile."
    if dense.any():
        caption += " Crossed out: left dense."
    if mixed(grid):
        caption += " Dots: lowrank; other colours: pivot."
    if (np.isnan(shown) & ~dense).any():
        caption += " Blank: no value."
    return Picture(name, caption, alt, partial(draw, grid), wide=True)


def _facts(plan: RankPlan, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """The headline: label, value and remark of its numbers."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.counts().items() if count)
    facts = [("Linear parameters kept", share(plan.ratio), f"modules: {kinds}")]
    made = rows[1:] if len(rows) == 2 else [row for row in rows if row.get("ratio") == plan.ratio]
    if len(made) != 1:  # not clear which row the plan made
        return facts
    for label, key in (("Perplexity", "perplexity"), ("Size", "weight_bytes")):
        values = [show(key, row, rows) for row in (rows[0], made[0])]
        value = values[1] if made[0] is rows[0] or set(values) == {NOT_MEASURED} else " → ".join(values)
        facts.append((label, value, _change(key, made[0], rows)))
    return facts


def _cells(row: Row, rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """A row of the summary: text and remarks of each cell."""
    cells: list[tuple[str, list[str]]] = [(_name(row), [])]
    for _, key, second in COLUMNS:
        notes = [_change(key, row, rows)] if key != "ratio" else []
        if second and row.get(key) is not None:
            notes.append(f"p95 {show(second, row, rows)}")
        cells.append((show(key, row, rows), [note for note in notes if note]))
    return cells


def _change(key: str, row: Row, rows: Sequence[Row]) -> str:
    """Relative change against the first row, or nothing where there is none to state."""
    value, base = row.get(key), rows[0].get(key)
    if row is rows[0] or value is None or not base or not math.isfinite(value / base):
        return ""
    return f"{value / base - 1:+.1%}".replace("-", "−")


def _name(row: Row) -> str:
    return row.get("name") or "unnamed"


def _setting(rows: Sequence[Row], *keys: str) -> str:
    """How the rows that have any of the numbers were measured; differences are spelled out."""
    conditions = CONDITIONS.get(keys[0], SPEED)
    found = []
    for row in rows:
        if conditions and any(row.get(key) is not None for key in keys):
            parts = [form.format(row[key]) for key, form in conditions.items() if row.get(key) is not None]
            found.append((_name(row), ", ".join(parts)))
    if len({text for _, text in found}) > 1:
        return "settings differ: " + "; ".join(f"{name}: {text or 'not stated'}" for name, text in found)
    return "" if not found else f"measured on {found[0][1]}" if found[0][1] else "settings not stated"


def _leaves(data: Any, path: str = "", depth: int = 8) -> Iterator[tuple[str, str]]:
    if isinstance(data, Mapping) and data and depth:
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key), depth - 1)
    elif isinstance(data, list | tuple) and data and not any(isinstance(v, Mapping | list | tuple) for v in data):
        yield path, ", ".join(str(value) for value in data)
    else:
        yield path, data if isinstance(data, str) else json.dumps(data, default=str, ensure_ascii=False)
