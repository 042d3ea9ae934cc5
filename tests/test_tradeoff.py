"""The figure of bytes against perplexity, from rows as the bench writes them."""

import json
from itertools import product

import pytest

from bench.byte_tables import TOGETHER
from bench.tradeoff_plot import CURVES, ROWS, draw


def row(name: str, share: float | None, value: float, rounding: str = "feedback") -> dict[str, object]:
    found: dict[str, object] = {"name": name, "rounding": rounding, "perplexity": {"wikitext2": value, "c4": 2 * value}}
    return found | ({} if share is None else {"share": share})


def test_every_way_to_spend_bytes_is_drawn() -> None:
    rows = [row("dense", None, 20.0, ""), row("nf4, nearest", 0.28, 30.0, "nearest"), row("nf4", 0.28, 25.0)]
    rows += [row(name, share, 10 / share) for name in CURVES for share in (0.3, 0.5)]
    first, second = draw(rows).axes
    labels = {line.get_label() for line in first.lines}
    assert labels == {*CURVES, "nf4, nearest (bitsandbytes' codes)", "nf4, fed back", "dense, bf16"}
    together = next(line for line in second.lines if line.get_label() == CURVES[0])
    assert list(together.get_xdata()) == [0.3, 0.5]
    assert list(together.get_ydata()) == pytest.approx([2 * 10 / 0.3, 2 * 10 / 0.5])


def test_the_committed_rows_can_be_drawn() -> None:
    assert ROWS.is_file()
    assert "chosen together" in ROWS.read_text(encoding="utf-8")


def test_no_other_way_to_spend_bytes_is_better_than_the_joint_choice() -> None:
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if row["name"] == "chosen together"]
    assert {row["asked"] for row in chosen if not row["plain"]} >= {0.5, 0.4, 0.3, 0.25, 0.22, 0.2}
    for joint, text in product(chosen, ("wikitext2", "c4")):
        fits = [row for row in rows if row["plain"] == joint["plain"] and row.get("share", 1) <= joint["asked"]]
        best = min(row["perplexity"][text] for row in fits if row["name"] not in TOGETHER)
        free = joint["plain"] and joint["asked"] == 0.5  # as good as dense whatever the choice: noise decides
        assert joint["perplexity"][text] <= best * (1.001 if free else 1), (joint["asked"], text)


def test_every_committed_row_meets_its_budget() -> None:
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    asked = [row for row in rows if row.get("asked")]
    assert len(asked) > 30
    for row in asked:
        assert 0 <= 1 - row["share"] / row["asked"] <= 1e-3, row["name"]
