"""The GPU suite's verdicts: goals, what a peer that would not run does to them, the line, the summary and the table."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.judge import judged, line
from bench.gpu.lines import Lines, gpu_table, told
from bench.gpu.work import Goal

ROW: dict[str, Any] = {
    "id": "K1",
    "name": "a layer",
    "error": 1e-3,
    "seconds": {
        "ours": {"p20": 4e-6, "p50": 5e-6, "p80": 6e-6},
        "dense cuBLAS": {"p20": 9e-6, "p50": 1e-5, "p80": 2e-5},
    },
    "speedup": {"dense cuBLAS": 2.0},
    "extra_bytes": {"ours": 50, "dense cuBLAS": 100},
    "rate": 200.0,
    "bandwidth": 0.7,
    "compute": 0.01,
    "goals": [],
}
BROKEN = {"dense compiled": "RuntimeError: no | compiler"}
FIGURES = {key: ROW[key] for key in ("seconds", "speedup", "bandwidth")}


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("microseconds", 5.0), True),
        (Goal("microseconds", 4.9), False),
        (Goal("bandwidth", 0.8), False),
        (Goal("speedup", 2.0, "dense"), True),
        (Goal("speedup", 2.1, "dense"), False),
        (Goal("speedup", 0.1, "a peer that is missing"), False),
        (Goal("memory", 0.5, "dense"), True),
        (Goal("memory", 0.4, "dense"), False),
        (Goal("error", 1e-3), True),
        (Goal("error", 9e-4), False),
        (Goal("rate", 200), True),
        (Goal("rate", 201), False),
    ],
)
def test_verdicts(goal: Goal, met: bool) -> None:
    assert judged(goal, ROW)["met"] is met


@pytest.mark.parametrize("figure", ["speedup", "memory"])
def test_the_best_peer_of_a_name_counts(figure: str) -> None:
    seconds = ROW["seconds"] | {"dense other": {"p20": 4e-6, "p50": 5e-6, "p80": 6e-6}}
    more = {"speedup": ROW["speedup"] | {"dense other": 1.0}, "extra_bytes": ROW["extra_bytes"] | {"dense other": 50}}
    assert judged(Goal(figure, 1.0, "dense"), ROW | more | {"seconds": seconds})["reached"] == 1.0


@pytest.mark.parametrize("figure", ["speedup", "memory"])
def test_a_goal_is_not_judged_on_the_rest_of_its_peers(figure: str) -> None:
    goal = judged(Goal(figure, 1.0, "dense"), ROW | {"broken_peers": BROKEN})
    assert (goal["reached"], goal["met"]) == (None, False)
    assert told(goal) == f"{figure} dense not measured for 1"
    other = judged(Goal(figure, 1.0, "dense cuBLAS"), ROW | {"broken_peers": BROKEN})
    assert other["reached"] is not None


def test_memory_of_calls_that_were_too_long_is_not_judged() -> None:
    assert judged(Goal("memory", 1.0, "dense"), ROW | {"extra_bytes": {"dense cuBLAS": 100}})["reached"] is None


def test_a_speedup_comes_with_its_spread() -> None:
    goal = judged(Goal("speedup", 2.5, "dense"), ROW)
    assert goal["spread"] == pytest.approx([1.5, 5.0])
    assert told(goal) == "speedup dense 2 (1.5 to 5) for 2.5"


def test_a_line_says_what_was_missed() -> None:
    row = ROW | {"goals": [judged(Goal("bandwidth", 0.8), ROW)], "broken_peers": BROKEN, "warm": True}
    assert "5.00 us, warm" in line(row)
    assert "2.00 × dense cuBLAS  dense compiled broken (RuntimeError: no | compiler)" in line(row)
    assert "missed: bandwidth 0.7 for 0.8" in line(row)
    assert "warm" not in line(ROW)
    assert "wrong answer" in line({"id": "K1", "name": "x", "failed": "wrong answer, not timed"})
    json.dumps(row)


def row(name: str, **more: object) -> dict[str, object]:
    return {"family": "packed", "id": "K1", "name": name, **more}


def test_the_file_is_summed_up(tmp_path: Path) -> None:
    """Goals met and missed of the newest figures, lines that failed or were left out; other commits do not count."""
    facts = {"device": "D", "versions": {"torch": "2"}, "commit": "abc"}
    lines = Lines(tmp_path / "rows.jsonl", facts)
    Lines(lines.path, facts | {"commit": "old"}).write(row("from another commit", failed="no"))
    goals = [judged(Goal("bandwidth", at), ROW) for at in (0.6, 0.8)]
    lines.write({"id": "tests", "exit": 1, "summary": "1 failed", "failed_tests": ["a"]})
    lines.write({"id": "ceiling", "bandwidth": 3e12, "flops": 8e14})
    lines.write(row("measured", failed="first try"))
    lines.write(row("measured", **FIGURES, goals=goals))
    lines.write(row("broken", failed="the process ended with -9"))
    lines.write(row("late", left_out="no time"))
    found = lines.summary()
    assert found["met"] == 1
    assert found["missed"] == ["K1 measured: bandwidth 0.7 for 0.8"]
    assert found["failed"] == ["K1 broken: the process ended with -9", "tests: 1 failed"]
    assert (found["left_out"], found["broken_peers"]) == (["K1 late"], [])
    table = gpu_table(lines.rows())
    assert "| K1 | measured | 5.00 (4.00 to 6.00) | 70 % | 2.00 × dense cuBLAS | met: bandwidth" in table
    assert "3.00 TB/s" in table
    assert "another commit" not in table


def test_peers_that_would_not_run_are_in_the_summary_and_the_table(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "rows.jsonl", {"commit": "abc"})
    goals = [judged(Goal("speedup", 1.5, "dense"), ROW | {"broken_peers": BROKEN})]
    lines.write(row("some", **FIGURES, goals=goals, broken_peers=BROKEN, warm=True))
    found = lines.summary()
    assert found["broken_peers"] == ["K1 some: dense compiled: RuntimeError: no | compiler"]
    assert found["missed"] == ["K1 some: speedup dense not measured for 1.5"]
    (line_,) = [text for text in gpu_table(lines.rows()).splitlines() if "K1" in text]
    assert "5.00 (4.00 to 6.00), warm | 70 % | 2.00 × dense cuBLAS, dense compiled broken (" in line_
    assert line_.count("|") == 7
