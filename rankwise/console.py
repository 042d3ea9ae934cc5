"""What people read: tables for the terminal, on stderr. stdout is for data: `--json`, generated text."""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
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
_WHO: tuple[Column, ...] = (
    ("engine", "engine", ""),
    ("name", "model", ""),
    ("ratio", "kept", ".1%"),
    ("dtype", "dtype", ""),
    ("ttft_ms", "TTFT ms p50 / p95 / p99", ">"),
    ("tpot_ms", "TPOT ms p50 / p95 / p99", ">"),
)
_AGAINST: tuple[Column, ...] = (("vs_ttft", "TTFT vs first", ">"), ("vs_tpot", "TPOT vs first", ">"))
SPEED_COLUMNS: tuple[Column, ...] = (
    *_WHO,
    ("tokens_per_s", "tokens/s", ".1f"),
    *_AGAINST,
    ("vs_tokens_per_s", "tokens/s vs first", ">"),
    ("mbu_percent", "% of bandwidth", ".0f"),
    ("weight_memory_bytes", "weights MB", "MB"),
    ("kv_bytes", "KV MB", "MB"),
    ("peak_bytes", "peak MB", "MB"),
)
LOAD_COLUMNS: tuple[Column, ...] = (
    *_WHO,
    ("e2e_ms", "end-to-end ms p50 / p95 / p99", ">"),
    ("tokens_per_s", "tokens/s", ".1f"),
    ("goodput_per_s", "good requests/s", ".2f"),
    ("good_share", "good", ".0%"),
    *_AGAINST,
    ("vs_e2e", "end-to-end vs first", ">"),
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


def speed_tables(found: Mapping[str, Any]) -> None:
    """What `rankwise bench` measured: a table a shape, and one of what was under load."""
    rows = [*found["rows"], *found["load"]]
    speed = "–".join(f"{value / 1e9:.1f}" for value in found["bandwidth_bytes_per_s"][::2])
    show(f"{rows[0]['device']}, {rows[0]['rounds']} rounds in turn; memory gives {speed} GB/s")
    for (batch, prompt), same in groupby(found["rows"], lambda row: (row["batch"], row["prompt"])):
        body = [_flat(row) for row in same]
        _print(f"batch {batch}, prompt {prompt}, {body[0]['new_tokens']} new tokens", SPEED_COLUMNS, body, wrap=True)
    if found["load"]:
        _print(_load_title(found["load"][0]), LOAD_COLUMNS, [_flat(row) for row in found["load"]], wrap=True)
    show("vs first: divided by the first row's within a round; median, p20 to p80 in brackets")


def _load_title(row: Mapping[str, Any]) -> str:
    mix = ", ".join(f"{prompt}:{output}" for prompt, output in row["mix"])
    limits = f"good: first token within {row['ttft_limit']:g} s, further ones within {row['tpot_limit']:g} s"
    return f"{row['requests']} requests a round at {row['rate']:g}/s, prompt:output {mix}; {limits}"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for a table: medians in place of p20, p50 and p80, percentiles and ratios as text."""
    flat = {key: value[1] if isinstance(value, list) and len(value) == 3 else value for key, value in row.items()}
    for key in ("ttft_ms", "tpot_ms", "e2e_ms"):
        flat[key] = " / ".join(f"{row[f'{key}_p{share}']:.1f}" for share in (50, 95, 99) if f"{key}_p{share}" in row)
    for key, (low, middle, high) in row["vs_first"].items():
        flat[f"vs_{key}"] = f"{middle:.2f} ({low:.2f}–{high:.2f})"
    return flat


def plan_table(plan: RankPlan, title: str) -> None:
    """A row a module."""
    columns: tuple[Column, ...] = (
        ("name", "module", ""),
        ("kind", "kind", ""),
        ("shape", "out × in", ""),
        ("rank", "rank", "d"),
        ("precision", "weights", ""),
        ("ratio", "kept", ".1%"),
        ("energy", "energy", ".2%"),
        ("parameters", "parameters", ",d"),
        ("bytes", "bytes", ",d"),
    )
    rows = [{**plan_row(name, plan), "precision": str(spec.precision)} for name, spec in plan]
    _print(title, columns, rows)


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
    more: dict[str, Any] = {"group": spec.group, "asymmetric": spec.asymmetric} if spec.group else {}
    if spec.dense_shape:
        more["dense_shape"], shape = list(spec.dense_shape), f"{shape} (of {' × '.join(map(str, spec.dense_shape))})"
    return {"name": name, "shape": shape, **{key: getattr(spec, key) for key in keys}, **more}


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on one line of stdout; numbers that JSON cannot say (NaN, infinities) become null."""
    sys.stdout.write(json.dumps(json_ready(data), sort_keys=True, allow_nan=False) + "\n")
    sys.stdout.flush()


def _print(title: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], *, wrap: bool = False) -> None:
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for _, heading, form in columns:
        table.add_column(heading, justify="right" if form else "left", no_wrap=not wrap)
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
