"""The GPU suite's lines of speculative decoding, on a CPU in small: right tokens, and only whole passes are timed."""

from typing import Any

import pytest
import torch
from tensors import DEVICE

from bench.gpu import engine, speculative, suite
from bench.gpu.measure import Ceiling
from bench.gpu.models import Shape
from bench.gpu.work import Work
from rankwise.engine.runtime.graphs import Graphs

TINY, SMALL = Shape(128, 2, 2, 192, 96), Shape(128, 2, 2, 192, 512)
NEW = 14


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, and graphs on a CPU: a replay is the decoder on the graph's buffers."""
    for module in (engine, speculative):
        monkeypatch.setattr(module, "NEW", NEW)
    if DEVICE == "cpu":
        monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
        make = lambda *arguments: Graphs(*arguments[:-1], lambda run: run)  # noqa: E731
        for module in ("engine", "speculative"):
            monkeypatch.setattr(f"rankwise.engine.runtime.{module}.forward", make)


@pytest.mark.parametrize("work", speculative.works(TINY, SMALL), ids=lambda work: work.id)
def test_every_line_is_right_and_judged(work: Work) -> None:
    torch.manual_seed(1)
    row = suite.measured(work, torch.device(DEVICE), Ceiling(1e12, 1e13))
    assert row["error"] <= (0.0 if work.id == "E0" else 1e-5 if DEVICE == "cpu" else engine.TOLERANCE)
    assert [goal["reached"] is not None for goal in row["goals"]] == [True]
    assert not row.get("broken_peers")
    if work.id == "E6":
        assert row["speedup"]["own dense"] == row["goals"][0]["reached"]
        assert f"{work.name[:52]}" in suite.line({"id": work.id, "name": work.name, **row})


def test_passes_are_graphs_of_model_and_draft() -> None:
    contest = speculative.passes("E6", TINY, 2, ()).build(torch.device(DEVICE))
    assert contest.clock is not None
    steps, broken = contest.clock()
    assert not broken
    running: Any = contest.ours.args[0]  # type: ignore[attr-defined]
    assert (8, engine.LONGEST) in running.forward.graphs  # two sequences, three guesses and a token each
    assert {size for size, _ in running.drafter.forward.graphs} >= {2}
    passes = len(steps["ours"]) / engine.ROUNDS
    assert 1 <= passes <= NEW - speculative.GUESSES  # not the first, nor those at the end, whose drafts are shorter


def test_a_draft_that_guesses_nothing_is_an_error() -> None:
    running = speculative._engine(TINY, speculative.INT4, 2, torch.device(DEVICE), torch.float32)
    running.drafter.most_sequences = 1  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="no draft was verified"):
        speculative.drafted(running, [[5] * 20, [6] * 20])
