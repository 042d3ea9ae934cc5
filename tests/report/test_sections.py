"""Provenance as tables."""

from typing import Any

from rankwise.report.sections import sections


def test_sections_flatten_what_is_nested() -> None:
    deep: dict[str, Any] = {"end": 1}
    for _ in range(200):
        deep = {"x": deep}
    data = {"a": {"b": {"c": 1.5, "d": []}, "e": [[1], 2]}, "f": None, "g": {}, "h": "text", "i": deep}
    flat, nested, last = sections(data)
    assert flat == ("", [("f", "null"), ("g", "{}"), ("h", "text")])
    assert nested == ("a", [("b.c", "1.5"), ("b.d", "[]"), ("e", "[[1], 2]")])
    assert len(last[1]) == 1
    assert '"end": 1' in last[1][0][1]


def test_candidates_are_rows() -> None:
    tried = [
        {"of": "joint", "predicted": 0.0123456789, "measured": 3.25},
        {"of": "q4", "predicted": None, "measured": None},
    ]
    ((head, rows),) = sections({"candidates": tried})
    assert head == "candidates: loss, nats a token"
    assert rows == [
        ("joint", "predicted 0.0123457, measured 3.25"),
        ("q4", "predicted not known, measured not known"),
    ]


def test_lists_that_are_no_tables_stay_as_they_are() -> None:
    ((_, rows),) = sections({"candidates": [{"of": {"a": 1}}, 3], "empty": [], "names": ["a", "b"]})
    assert rows == [("candidates", '[{"of": {"a": 1}}, 3]'), ("empty", "[]"), ("names", "a, b")]
    (_, (head, rows)) = sections({"seed": 0, "runs": [{"x": 1}, {}]})
    assert (head, rows) == ("runs", [("1", "x 1"), ("2", "")])
