"""What people read: tables for the terminal, on stderr. stdout is for data: `--json`, generated text."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rankwise.files import json_ready
from rankwise.plan import RankPlan

Column = tuple[str, str, str]  # key, heading, format
WIDE = 1000  # columns for files and pipes, so that nothing is cut there
MODEL_COLUMNS: tuple[Column, ...] = (
    ("name", "model", ""),
    ("ratio", "kept", ".1%"),
    ("weight_bytes", "MB on disk", "MB"),
    ("perplexity", "perplexity", ".2f"),
    ("accuracy", "mean acc", ".1%"),
    ("accuracy_norm", "mean acc_norm", ".1%"),
    ("prefill_ms_p50", "prefill ms p50", ".1f"),
    ("prefill_ms_p95", "p95", ".1f"),
    ("decode_ms_p50", "decode ms p50", ".2f"),
    ("decode_ms_p95", "p95", ".2f"),
    ("tokens_per_s", "tokens/s", ".1f"),
    ("peak_bytes", "peak MB", "MB"),
)


def show(text: str) -> None:
    """One line for people."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False, emoji=False)


def model_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A row a model; columns that no row has a value for are left out."""
    columns = [c for c in MODEL_COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    _print(title, columns, rows)


def task_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A row for every task and model, models side by side; nothing where no model was measured on tasks."""
    heads: tuple[Column, ...] = (
        ("task", "task", ""),
        ("name", "model", ""),
        ("questions", "questions", "d"),
        ("acc", "acc", ".1%"),
        ("acc_stderr", "±", ".1%"),
        ("acc_norm", "acc_norm", ".1%"),
        ("acc_norm_stderr", "±", ".1%"),
        ("truncated", "truncated", "d"),
    )
    tasks = rows[0].get("tasks", {})
    body = [{"task": task, "name": row["name"], **row["tasks"][task]} for task in tasks for row in rows]
    columns = [head for head in heads if any(row.get(head[0]) for row in body)]
    if body:
        _print("zero-shot accuracy (lm-eval)", columns, body)


def plan_table(plan: RankPlan, title: str) -> None:
    """A row a module."""
    columns: tuple[Column, ...] = (
        ("name", "module", ""),
        ("kind", "kind", ""),
        ("shape", "out × in", ""),
        ("rank", "rank", "d"),
        ("weights", "weights", ""),
        ("ratio", "kept", ".1%"),
        ("energy", "energy", ".2%"),
        ("parameters", "parameters", ",d"),
        ("bytes", "bytes", ",d"),
    )
    _print(title, columns, [plan_row(name, plan) for name in plan.layers])


def method_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A row an allocation method."""
    heads = (
        ("method", "--method"),
        ("what", "what it is"),
        ("sides", "--sides"),
        ("learns", "trains"),
        ("set", "--set"),
    )
    _print("allocation methods", [(key, heading, "") for key, heading in heads], rows)


def plan_row(name: str, plan: RankPlan) -> dict[str, Any]:
    """One module of a plan as flat data."""
    spec = plan.layers[name]
    keys = ("kind", "rank", "weights", "ratio", "energy", "loss", "parameters", "bytes")
    shape = f"{spec.out_features} × {spec.in_features}"
    return {"name": name, "shape": shape, **{key: getattr(spec, key) for key in keys}}


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on one line of stdout; numbers that JSON cannot say (NaN, infinities) become null."""
    sys.stdout.write(json.dumps(json_ready(data), sort_keys=True, allow_nan=False) + "\n")
    sys.stdout.flush()


def _print(title: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for _, heading, form in columns:
        table.add_column(heading, justify="right" if form else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(number(row.get(key), form)) for key, _, form in columns))
    width = None if sys.stderr.isatty() else WIDE
    Console(stderr=True, highlight=False, width=width).print(table, emoji=False)


def number(value: Any, form: str) -> str:
    """A value in a format; a dash for None, megabytes for the format `MB`."""
    if value is None:
        return "–"
    if form == "MB":
        return f"{value / 1e6:.1f}"
    return format(value, form) if form else str(value)
