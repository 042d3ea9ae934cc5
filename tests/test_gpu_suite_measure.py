"""How the GPU suite times: on a CPU with clocks, events and graphs that only pretend."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensors import DEVICE

from bench.gpu import measure, suite
from bench.gpu.measure import Ceiling, error, is_warm, quantiles, require_answers, time_peers_once, works_still
from bench.gpu.work import Call, Contest, Work, built

L2 = 50 * 2**20


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device to wait for, with the cache of an H100."""
    if DEVICE == "cpu":
        monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(L2_cache_size=L2))


def contest(ours: Call, peers: dict[str, Call] | None = None) -> Contest:
    return Contest(ours, peers or {}, lambda: torch.ones(3, dtype=torch.float64), 1e-3)


def work_of(contest_: Contest, bytes_: int = 2**30, **more: Any) -> Work:
    return Work("X", "a line", lambda _: contest_, bytes_, **more)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rounds that were asked for; every run takes a millisecond."""
    asked: list[int] = []

    def events(runs: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
        asked.append(rounds)
        for run in runs:
            run()
        return [[1e-3] * rounds for _ in runs]

    monkeypatch.setattr(measure, "_events", events)
    return asked


def recorded(monkeypatch: pytest.MonkeyPatch, spoil: bool = False) -> list[int]:
    """Calls of every graph; a replay writes into what the calls made when it was captured, unless it is to spoil it."""
    sizes: list[int] = []

    def captured(calls: list[Call], passes: int) -> tuple[Callable[[], Any], list[Any]]:
        sizes.append(len(calls) * passes)
        answers = [call().clone() for call in calls]

        def replay() -> None:
            for answer, call in zip(answers, calls, strict=True):
                answer.copy_(call())
            if spoil:
                answers[-1].zero_()

        return replay, answers

    monkeypatch.setattr(measure, "_captured", captured)
    return sizes


def test_errors_are_relative_and_nan_is_no_answer() -> None:
    one = torch.ones(4)
    assert error(one, one) == 0
    assert error((one, one * 1.1), (one, one)) == pytest.approx(0.1, rel=1e-5)
    assert error(one * float("nan"), one) == float("inf")
    assert quantiles([1.0, 2.0, 3.0])["p50"] == 2.0


def test_a_graph_of_few_sets_goes_over_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time is that of a replay over all its calls."""
    rounds, sizes = counted(monkeypatch), recorded(monkeypatch)
    one = contest(lambda: torch.ones(3), {"peer": lambda: torch.ones(3)})
    for sets, cold, calls in ((3, True, 33), (48, True, 48), (1, False, 1)):
        times, broken = measure.time_work(work_of(one, cold=cold), [one] * sets)
        assert sizes[-2:] == [calls, calls]
        assert times["ours"]["p50"] == times["peer"]["p50"] == pytest.approx(1e-3 / calls)
        assert not broken
    assert rounds == [1, measure.ROUNDS] * 3


@pytest.mark.parametrize("spoil", [False, True])
def test_a_graph_that_writes_a_wrong_answer_fails_its_line(spoil: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch)
    recorded(monkeypatch, spoil)
    one = contest(lambda: torch.ones(3), {"peer": lambda: torch.zeros(3)})
    monkeypatch.setattr(suite, "extra_bytes", lambda _: 1)
    row = suite.guarded(work_of(one), torch.device(DEVICE), Ceiling(1.0, 1.0))
    assert ("wrong answer of the graph, not timed" in row.get("failed", "")) is spoil
    assert ("seconds" in row) is not spoil


@pytest.mark.skipif(DEVICE == "cuda", reason="a graph that only pretends")
def test_a_graph_keeps_what_its_last_pass_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, stream = SimpleNamespace(replay=lambda: None), SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: graph)
    monkeypatch.setattr("torch.cuda.Stream", lambda: stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: stream)
    for name in ("graph", "stream"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, **__: nullcontext())
    seen: list[str] = []
    calls = [lambda name=name: seen.append(name) or len(seen) for name in "abc"]  # type: ignore[func-returns-value, misc]
    replay, answers = measure._captured(calls, 4)
    assert replay is graph.replay
    assert seen == [*"ab", *"abc" * 4]  # two before the capture
    assert answers == [12, 13, 14]


def test_answers_from_before_the_replay_do_not_count() -> None:
    answers = [(torch.ones(3),)]
    one = contest(lambda: (torch.ones(3),))
    with pytest.raises(ArithmeticError, match="on set 0"):
        require_answers(lambda: None, answers, [one])


def test_long_calls_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their memory is not looked at; the others are timed as ever."""
    rounds = counted(monkeypatch)
    calls: list[str] = []
    monkeypatch.setattr(measure, "time_once", lambda call: (9.0 if call() is None else 1e-3, None))
    slow = contest(lambda: torch.ones(3), {"slow": lambda: calls.append("slow"), "quick": lambda: torch.ones(3)})
    times, _ = measure.time_work(work_of(slow, graph=False, cold=False), [slow])
    assert times["slow"] == {"p20": 9.0, "p50": 9.0, "p80": 9.0}
    assert calls == ["slow"] * 3
    assert rounds == [1, measure.ROUNDS]
    assert times["quick"]["p50"] == times["ours"]["p50"] == 1e-3


def test_all_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "time_once", lambda call: (9.0, call()))
    one = contest(lambda: torch.ones(3))
    times, _ = measure.time_work(work_of(one), [one])
    assert times["ours"]["p50"] == 9.0


def test_peers_that_cannot_be_made_or_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch)
    peers = {"good": lambda: 1, "bad": lambda: [][0], "never made": built(lambda: 1 // 0)}  # type: ignore[arg-type, return-value]
    reasons = {
        "bad": "IndexError: list index out of range",
        "never made": "ZeroDivisionError: integer division or modulo by zero",
    }
    times, broken = time_peers_once(peers)
    assert (set(times), broken) == ({"good"}, reasons)
    one = contest(lambda: torch.ones(3), peers)
    times, broken = measure.time_work(work_of(one, graph=False), [one])
    assert (set(times), broken) == ({"ours", "good"}, reasons)


def test_inputs_that_fit_into_the_cache_are_called_warm() -> None:
    device = torch.device(DEVICE)
    for bytes_, warm in ((2**14, True), (2**22, False), (2**30, False)):
        work = work_of(contest(lambda: None), bytes_)
        assert is_warm(work, measure.sets_for(work, device), device) is warm


def test_a_device_that_draws_no_numbers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert works_still(torch.device(DEVICE))

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    monkeypatch.setattr("torch.randn", refused)
    assert not works_still(torch.device(DEVICE))
