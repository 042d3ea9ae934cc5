"""The GPU suite's lines of the runtime, on a CPU in small: models, their answers, how steps are timed and judged."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensors import DEVICE

from bench.gpu import engine, suite
from bench.gpu.measure import Ceiling, error
from bench.gpu.models import Kind, Shape, llama, specs
from bench.gpu.work import Contest, Work
from rankwise.engine.layers import LowRankLinear, PivotLinear, QuantisedLinear
from rankwise.engine.runtime.graphs import Graphs
from rankwise.kernels.backend import backend

TINY, SMALL = Shape(128, 2, 2, 192, 96), Shape(128, 2, 2, 192, 512)
WORKS, WHOLE = engine.works(TINY, SMALL, many=4), engine.works()
GOALS = {
    ("E1", 1): ["bandwidth  0.75"],
    ("E2", 1): ["speedup own dense 1.7", "speedup transformers 3"],
    ("E3", 1): ["rate  450"],
    ("E4", 64): ["speedup own dense 1.6"],
    ("E5", 1): ["speedup own dense 1.12"],
    ("E5", 64): ["speedup own dense 1.12"],
}
TOP = Ceiling(1e12, 1e13)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens; and nothing to wait for where there is no GPU."""
    monkeypatch.setattr(engine, "NEW", 6)
    monkeypatch.setattr(engine, "PEER_NEW", 4)
    if DEVICE == "cpu":
        monkeypatch.setattr("torch.cuda.synchronize", lambda: None)


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs on a CPU: a replay is the decoder on the graph's buffers."""
    if DEVICE == "cpu":
        make = lambda *arguments: Graphs(*arguments[:-1], lambda run: run)  # noqa: E731
        monkeypatch.setattr("rankwise.engine.runtime.engine.forward", make)


@pytest.mark.usefixtures("graphed")
@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.id} {work.name}")
def test_every_line_is_right_and_judged(work: Work) -> None:
    torch.manual_seed(1)
    row = suite.measured(work, torch.device(DEVICE), TOP)
    assert "failed" not in row
    assert row["error"] <= (0.0 if work.id == "E0" else 1e-5 if DEVICE == "cpu" else engine.TOLERANCE)
    assert row["seconds"]["ours"]["p20"] <= row["seconds"]["ours"]["p80"]
    assert len(row["goals"]) == len(work.goals) > 0
    assert all(goal["reached"] is not None for goal in row["goals"])
    if work.id != "E0":
        assert row["rate"] == pytest.approx(work.tokens / row["seconds"]["ours"]["p50"])
        assert "its graph alone" in row["speedup"]
        assert f"{row['rate']:.0f} tokens/s" in suite.line({"id": work.id, "name": work.name, **row})


def test_goals_are_those_of_the_whole_model() -> None:
    """By id and batch; the bytes are those of Llama-2-7B's weights, and of the cache."""
    found: dict[tuple[str, int], list[str]] = {}
    for work in WHOLE:
        if work.tokens:
            goals = [f"{goal.figure} {goal.peer} {goal.at:g}" for goal in work.goals]
            assert found.setdefault((work.id, work.tokens), goals) == goals
    assert found == GOALS
    (dense,) = [work for work in WHOLE if work.id == "E1"]
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096 + 65 * 4096
    assert dense.bytes == 2 * (weights + 2 * 32 * 4096 * 160)


@pytest.mark.parametrize(("kind", "kept"), [("lowrank", 0.5), ("lowrank", 0.8), ("pivot", 0.5), ("pivot", 0.8)])
def test_ranks_keep_the_share(kind: str, kept: float) -> None:
    found = specs(Shape(), [Kind(kind, kept)], torch.bfloat16)
    assert len(found) == 224
    assert sum(s.parameters for s in found.values()) / sum(s.dense_parameters for s in found.values()) == pytest.approx(
        kept, abs=2e-3
    )
    assert all(spec.rank % 8 == 0 for spec in found.values())
    assert all(s.rank % 64 == 0 for s in specs(Shape(), [Kind(kind, kept, int4=True)], torch.bfloat16).values())


def test_models_are_on_their_device_and_keep_the_size_of_what_they_are_given() -> None:
    kinds = [Kind(), Kind("lowrank", 0.5), Kind("pivot", 0.5), Kind(int4=True), Kind("lowrank", 0.6, True, True)]
    model = llama(SMALL, kinds, torch.device(DEVICE), torch.float32)
    made = [type(module) for module in model.modules()]
    assert all(made.count(kind) >= 2 for kind in (LowRankLinear, PivotLinear, QuantisedLinear))
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {DEVICE}
    with torch.no_grad(), backend("torch"):
        logits = model(torch.arange(40, device=DEVICE)[None]).logits
    assert 0.5 < float(logits.std()) < 2


def decoding(device: str = DEVICE) -> Contest:
    return engine.decoding("E2", TINY, Kind("lowrank", 0.5), 3, ("own dense",), ()).build(torch.device(device))


def test_a_wrong_weight_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits come from the engine, not from the model that it was made of."""
    convert = engine.convert

    def spoilt(model: Any, positions: int) -> Any:
        model.model.layers[1].mlp.down_proj.lowrank_u.data.mul_(1.5)
        return convert(model, positions)

    monkeypatch.setattr(engine, "convert", spoilt)
    contest = engine.decoding("E2", TINY, Kind("lowrank", 0.5), 3, (), ()).build(torch.device(DEVICE))
    assert error(contest.ours(), contest.reference()) > contest.tolerance


@pytest.mark.usefixtures("graphed")
def test_logits_are_of_steps_that_decode() -> None:
    contest = decoding()
    first, again = contest.ours(), contest.ours()
    running: Any = contest.ours.args[0]  # type: ignore[attr-defined]
    assert set(running.forward.graphs) == {(3, engine.LONGEST)}
    assert error(again, first) < 1e-5


def test_only_steps_that_decode_are_timed() -> None:
    contest = decoding()
    assert contest.clock is not None
    steps, broken = contest.clock()
    assert not broken
    assert set(steps) >= {"ours", "own dense"}
    assert {len(steps[name]) for name in ("ours", "own dense")} == {engine.ROUNDS * (engine.NEW - 1)}


def test_competitors_take_turns_after_a_round_that_does_not_count() -> None:
    seen: list[str] = []

    def run(name: str) -> Callable[[], list[float]]:
        return lambda: seen.append(name) or [float(len(seen))]  # type: ignore[func-returns-value]

    runs = {"ours": run("a"), "b": run("b"), "bad": lambda: [[][0]]}  # type: ignore[dict-item]
    times, broken = engine.in_turn(runs, rounds=2)
    assert times == {"ours": [3.0, 5.0], "b": [4.0, 6.0]}
    assert broken == {"bad": "IndexError: list index out of range"}
    assert seen == ["a", "b"] * 3
    with pytest.raises(IndexError):
        engine.in_turn({"ours": runs["bad"]})


@pytest.mark.usefixtures("graphed")
def test_a_peer_that_cannot_be_made_does_not_cost_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(engine, "peer", refused)
    (work,) = [work for work in WORKS if work.id == "E1"]
    row = suite.measured(work, torch.device(DEVICE), TOP)
    assert list(row["broken_peers"].values()) == ["RuntimeError: no room"]
    assert row["goals"][0]["reached"] is not None


def test_a_step_without_a_graph_is_an_error_on_a_gpu() -> None:
    running: Any = copy.copy(decoding().ours.args[0])  # type: ignore[attr-defined]
    running.forward = lambda batch: batch
    running.decoder = type("Decoder", (), {"embed": type("Table", (), {"is_cuda": True})})
    with pytest.raises(RuntimeError, match="no step ran as a CUDA graph"):
        engine.require_graphs(running)
