"""One self-contained HTML page, and its figures as PNG files beside it."""

import base64
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import rankwise
from rankwise.config import check
from rankwise.errors import RankwiseError
from rankwise.figures import THEMES, to_png
from rankwise.files import disk_guard, publish
from rankwise.plan import RankPlan
from rankwise.report.formats import NOT_MEASURED, Row, change, loss, name_of, setting, share, show
from rankwise.report.pictures import Picture, bar_pictures, map_pictures, tradeoff_pictures
from rankwise.report.sections import sections

PAGE = "index.html"
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


def write_report(
    plan: RankPlan, rows: Sequence[Row], folder: str | Path, *, title: str, made: int | None = None
) -> Path:
    """Write a page that shows what a plan made of a model, and what was measured.

    Args:
        plan: its provenance is printed whole.
        rows: one mapping a model, the dense one first. Keys, each of which may be missing or None: `name`, `ratio`,
            `weight_bytes`, `perplexity`, `text` (what the perplexity was measured on), `prefill_ms_p50`,
            `prefill_ms_p95`, `decode_ms_p50`, `decode_ms_p95`, `tokens_per_s`, `peak_bytes`, and how the times were
            taken: `device`, `dtype`, `prompt`, `new_tokens`, `batch`, `rounds`. Other keys are not looked at.
        folder: must not exist; gets `index.html` and `<figure>-<theme>.png`.
        title: the page's heading.
        made: place in `rows` of the model that the plan made; left out, it is found by its kept share if that is clear.

    Returns:
        The path of `index.html`.

    Raises:
        RankwiseError: the folder exists or cannot be written, or a value is of the wrong kind.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise RankwiseError("folder", str(folder), "allowed: a folder that does not exist yet")
    _check(plan, rows)
    check("made", made, made is None or 0 <= made < len(rows), "a place in rows, or None")
    pictures = [*map_pictures(plan), *tradeoff_pictures(rows), *bar_pictures(rows)]
    images = {f"{p.name}-{theme.name}.png": to_png(p.draw, theme) for p in pictures for theme in THEMES}
    facts = _facts(plan, rows, made)
    page = _render(plan, rows, title, facts, pictures, images)
    try:
        with disk_guard(folder):
            _write({**images, PAGE: page.encode("utf-8", "replace")}, folder)
    except OSError as error:
        raise RankwiseError("folder", f"{folder} ({error.strerror})", "allowed: a folder that can be made") from None
    return folder / PAGE


def _render(
    plan: RankPlan,
    rows: Sequence[Row],
    title: str,
    facts: Sequence[tuple[str, str, str]],
    pictures: Sequence[Picture],
    images: Mapping[str, bytes],
) -> str:
    loader = PackageLoader("rankwise", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(share=share, loss=loss)
    return environment.get_template("report.html.j2").render(
        title=title,
        version=rankwise.__version__,
        themes={theme.name: theme for theme in THEMES},
        facts=facts,
        columns=["Model", *(heading for heading, _, _ in COLUMNS)],
        table=[_cells(row, rows) for row in rows],
        settings=[("Perplexity", setting(rows, "perplexity")), ("Speed and memory", setting(rows, *TIMED))],
        pictures=pictures,
        sources={name: base64.b64encode(png).decode("ascii") for name, png in images.items()},
        sizes={name: struct.unpack(">II", png[16:24]) for name, png in images.items()},
        plan=plan,
        total_loss=plan.loss,
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


def _facts(plan: RankPlan, rows: Sequence[Row], made: int | None) -> list[tuple[str, str, str]]:
    """The headline: label, value and remark of its numbers."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.counts().items() if count)
    facts = [("Linear parameters kept", share(plan.ratio), f"modules: {kinds}")]
    alike = rows[1:] if len(rows) == 2 else [row for row in rows if row.get("ratio") == plan.ratio]
    if made is None and len(alike) != 1:  # not clear which row the plan made
        return facts
    own = alike[0] if made is None else rows[made]
    for label, key in (("Perplexity", "perplexity"), ("Size", "weight_bytes")):
        values = [show(key, row, rows) for row in (rows[0], own)]
        value = values[1] if own is rows[0] or set(values) == {NOT_MEASURED} else " → ".join(values)
        facts.append((label, value, change(key, own, rows)))
    return facts


def _cells(row: Row, rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """A row of the summary: text and remarks of each cell."""
    cells: list[tuple[str, list[str]]] = [(name_of(row), [])]
    for _, key, second in COLUMNS:
        notes = [change(key, row, rows)] if key != "ratio" else []
        if second and row.get(key) is not None:
            notes.append(f"p95 {show(second, row, rows)}")
        cells.append((show(key, row, rows), [note for note in notes if note]))
    return cells
