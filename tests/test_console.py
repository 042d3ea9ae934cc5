"""What people and scripts read: tables on stderr, one line of JSON on stdout."""

import json
from typing import Any

import pytest

from rankwise import console
from rankwise.plan import LayerSpec, RankPlan

FULL: dict[str, Any] = {
    "name": "small",
    "ratio": 0.7994,
    "weight_bytes": 5_123_456,
    "perplexity": 26.904,
    "prefill_ms_p50": 101.26,
    "prefill_ms_p95": 120.0,
    "decode_ms_p50": 7.126,
    "decode_ms_p95": 9.5,
    "tokens_per_s": 140.33,
    "peak_bytes": 800_000_000,
}
SHOWN = ["small", "79.9%", "5.1", "26.90", "101.3", "120.0", "7.13", "9.50", "140.3", "800.0"]


def cells(line: str) -> list[str]:
    """What stands between the bars of a table's row."""
    return [cell.strip() for cell in line.strip("│┃ \n").replace("┃", "│").split("│")]


def rows_of(table: str) -> list[list[str]]:
    """Heading and rows of a printed table."""
    return [cells(line) for line in table.splitlines() if line.startswith(("│", "┃"))]


def test_model_table_rounds_each_number_by_its_kind(capfd: pytest.CaptureFixture[str]) -> None:
    console.model_table([FULL], "three windows of docs.txt")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0].strip() == "three windows of docs.txt"
    heading, row = rows_of(err)
    assert row == SHOWN
    assert heading[:4] == ["model", "kept", "MB on disk", "perplexity"]


def test_columns_that_nobody_measured_are_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "dense", "perplexity": 22.88, "tokens_per_s": None}, {"name": "small", "ratio": 0.8}]
    console.model_table(rows, "title")
    assert rows_of(capfd.readouterr().err) == [
        ["model", "kept", "perplexity"],
        ["dense", "–", "22.88"],
        ["small", "80.0%", "–"],
    ]


def test_zero_is_a_number_and_not_a_gap(capfd: pytest.CaptureFixture[str]) -> None:
    console.model_table([{"name": "a", "weight_bytes": 0}], "title")
    assert rows_of(capfd.readouterr().err)[1] == ["a", "0.0"]


def test_plan_table_has_a_row_a_module_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    layers = {
        "model.layers.1.mlp.up_proj": LayerSpec("lowrank", 128, 64, 8, "bf16", energy=0.98765),
        "model.layers.0.self_attn.q_proj": LayerSpec("pivot", 64, 64, 16, "fp32"),
        "model.layers.0.mlp.down_proj": LayerSpec("dense", 64, 2048, 64, energy=1.0, loss=0.0),
    }
    console.plan_table(RankPlan(layers), "plan")
    assert rows_of(capfd.readouterr().err)[1:] == [
        ["model.layers.1.mlp.up_proj", "lowrank", "128 × 64", "8", "bf16", "18.8%", "98.77%", "1,536", "3,072"],
        ["model.layers.0.self_attn.q_proj", "pivot", "64 × 64", "16", "fp32", "43.8%", "–", "1,792", "7,424"],
        ["model.layers.0.mlp.down_proj", "dense", "64 × 2048", "64", "bf16", "100.0%", "100.00%", "131,072", "262,144"],
    ]


def test_plan_row_is_flat_and_complete() -> None:
    spec = LayerSpec("pivot", 64, 48, 16, "bf16", energy=0.5, loss=0.25)
    row = console.plan_row("a.b", RankPlan({"a.b": spec}))
    assert row == {
        "name": "a.b",
        "shape": "64 × 48",
        "kind": "pivot",
        "rank": 16,
        "weights": "bf16",
        "ratio": 16 * (64 + 48 - 16) / (64 * 48),
        "energy": 0.5,
        "loss": 0.25,
        "parameters": 16 * (64 + 48 - 16),
        "bytes": 2 * 16 * (64 + 48 - 16) + 4 * 64,
    }
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    "name",
    ["llama[v2]", "[bold]", "runs/[/x]", "[red]a[/red]", ":smile:", "a\\[b]", "x" * 240],
    ids=["tag", "style", "closing-tag", "pair", "emoji", "backslash", "240-characters"],
)
@pytest.mark.parametrize("where", ["model", "title", "module", "line"])
def test_names_are_printed_as_they_are(name: str, where: str, capfd: pytest.CaptureFixture[str]) -> None:
    """File names may hold anything, and a table in a log file is never cut."""
    if where == "model":
        console.model_table([{"name": name, "perplexity": 1.0}], "title")
    elif where == "title":
        console.model_table([{"name": "a", "perplexity": 1.0}], name)
    elif where == "module":
        console.plan_table(RankPlan({name: LayerSpec("dense", 4, 4, 4)}), "title")
    else:
        console.show(f"out: {name}")
    printed = capfd.readouterr().err
    if where == "title":
        printed = "".join(line.strip() for line in printed.splitlines())  # a long title may be wrapped
    assert name in printed


def test_lines_for_people_go_to_stderr_whole(capfd: pytest.CaptureFixture[str]) -> None:
    text = "word " * 100 + "60.0% of 1234 'quoted' http://host/path"
    console.show(text)
    assert capfd.readouterr() == ("", text + "\n")


def test_print_json_is_one_sorted_line_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    data = {"b": 1, "a": {"z": "line\nbreak", "é": [1.5, None, True]}}
    console.print_json(data)
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert out.endswith("\n")
    assert json.loads(out) == data
    assert list(json.loads(out)) == ["a", "b"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_print_json_is_json_whatever_was_measured(value: float, capfd: pytest.CaptureFixture[str]) -> None:
    """NaN and Infinity are no JSON; most parsers refuse them."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    console.print_json({"perplexity": value})
    json.loads(capfd.readouterr().out, parse_constant=refuse)
