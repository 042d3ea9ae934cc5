"""How a contest is timed on a GPU: calls captured in CUDA graphs, on inputs that are not in the cache, in turn.

Each competitor gets one graph with calls on every set of inputs; the graphs are replayed in turn, so that a change of
clocks hits all of them alike. A time is that of a replay over its number of calls. What ours wrote in its graph is
compared with the exact answers before.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.work import Call, Contest, Work, reason

ROUNDS = 60
SLOW = 0.01  # seconds; calls that take longer are timed fewer times
LEAST_ROUNDS = 5
LONG = 0.2  # seconds; calls that take longer are timed once
FILL = 3  # times the L2 cache that all sets of inputs together outgrow
MOST_SETS = 48  # too few for small works, which stay in the cache: `is_warm`
CALLS = 32  # of a graph at least, in which start and end of a replay weigh little


@dataclass(frozen=True)
class Ceiling:
    """What the device reached in this run.

    Args:
        bandwidth: bytes a second, of a copy of 1 GiB; read and written bytes count.
        flops: of an 8192³ product in bf16.
    """

    bandwidth: float
    flops: float


def ceiling(device: torch.device) -> Ceiling:
    """Measure both."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy = quantiles(_events([lambda: target.copy_(source)], 20)[0])["p50"]
    multiply = quantiles(_events([lambda: a @ b], 20)[0])["p50"]
    return Ceiling(2 * source.nbytes / copy, 2 * 8192**3 / multiply)


def error(found: Any, exact: Any) -> float:
    """The largest `‖y - y*‖ / ‖y*‖` among the tensors of an answer; NaN counts as infinite."""
    pairs = zip(_tensors(found), _tensors(exact), strict=True)
    errors = [float((y.double() - e.double()).norm() / e.double().norm().clamp_min(1e-300)) for y, e in pairs]
    return max(math.inf if math.isnan(each) else each for each in errors)


def time_work(work: Work, contests: Sequence[Contest]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Seconds a call, p20, p50 and p80, of ours and every peer; and peers that would not run, with the reason.

    Args:
        work: what is timed.
        contests: on different inputs, taken in turn.

    Raises:
        ArithmeticError: our graph writes a wrong answer.
    """
    passes = math.ceil(CALLS / len(contests)) if work.graph and work.cold else 1
    found: dict[str, dict[str, float]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    broken: dict[str, str] = {}
    for name in ("ours", *contests[0].peers):
        try:
            calls = [contest.ours if name == "ours" else contest.peers[name] for contest in contests]
            if (seconds := _long(calls[0])) is not None:
                found[name] = quantiles([seconds])
            else:
                runs[name] = _ready(work, calls, passes, contests if name == "ours" else None)
        except Exception as problem:
            if name == "ours":
                raise
            broken[name] = reason(problem)
    times = _in_turn(list(runs.values())) if runs else []
    for name, each in zip(runs, times, strict=True):
        found[name] = quantiles([seconds / (passes * len(contests)) for seconds in each])
    return found, broken


def time_once(call: Call) -> tuple[float, Any]:
    """Seconds of one call, the device waited for before and after, and its answer."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    answer = call()
    torch.cuda.synchronize()
    return time.perf_counter() - started, answer


def time_peers_once(peers: dict[str, Call]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Seconds of one call of every peer, as `time_work` gives them; and peers that would not run, with the reason."""
    found: dict[str, dict[str, float]] = {}
    broken: dict[str, str] = {}
    for name, call in peers.items():
        try:
            found[name] = quantiles([time_once(call)[0]])
        except Exception as problem:
            broken[name] = reason(problem)
    return found, broken


def sets_for(work: Work, device: torch.device) -> int:
    """How many sets of inputs outgrow the cache."""
    if not work.cold:
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MOST_SETS, math.ceil(FILL * cache / work.bytes)))


def is_warm(work: Work, sets: int, device: torch.device) -> bool:
    """Whether all sets of inputs together fit into the cache."""
    return sets * work.bytes < torch.cuda.get_device_properties(device).L2_cache_size


def works_still(device: torch.device) -> bool:
    """Whether the device answers and draws numbers; a capture that failed leaves its generator unable to."""
    try:
        torch.cuda.synchronize()
        return bool(torch.isfinite(torch.randn(8, device=device)).all())
    except RuntimeError:
        return False


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "p50", "p80"), found.tolist(), strict=True))


def require_answers(run: Callable[[], Any], answers: Sequence[Any], contests: Sequence[Contest]) -> None:
    """Run once and compare what that writes with the exact answers.

    Args:
        run: writes the answers where they are.
        answers: one for each contest.
        contests: that were run.

    Raises:
        ArithmeticError: one is wrong.
    """
    for tensor in (tensor for answer in answers for tensor in _tensors(answer)):
        tensor.detach().zero_()
    run()
    torch.cuda.synchronize()
    for number, (answer, contest) in enumerate(zip(answers, contests, strict=True)):
        wrong = error(answer, contest.reference())
        if not wrong <= contest.tolerance:
            raise ArithmeticError(f"wrong answer of the graph, not timed: {wrong:.1e} on set {number}")


def _long(call: Call) -> float | None:
    """Seconds of a call that takes long, not its first; None of another."""
    call()
    for _ in range(2):  # libraries may load something in the second one still
        seconds, _ = time_once(call)
        if seconds <= LONG:
            return None
    return seconds


def _ready(work: Work, calls: Sequence[Call], passes: int, judges: Sequence[Contest] | None) -> Callable[[], Any]:
    """A run of all calls, so many times, warmed up: they are compiled, and the caches of libraries are filled.

    Args:
        work: what is timed.
        calls: on each set of inputs.
        passes: over all sets.
        judges: know what a graph has to write; None: it is not looked at.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    if not work.graph:
        return _each([*calls] * passes)
    run, answers = _captured(calls, passes)
    if judges is not None:
        require_answers(run, answers, judges)
    return run


def _captured(calls: Sequence[Call], passes: int) -> tuple[Callable[[], Any], list[Any]]:
    """A graph's replay, and what its last pass writes."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # buffers that belong to a stream are made before the capture
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in [*calls] * (passes - 1):
            call()
        answers = [call() for call in calls]
    return graph.replay, answers


def _each(calls: Sequence[Call]) -> Callable[[], Any]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _in_turn(runs: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Seconds of each run, as often as there is time for."""
    (probe,) = zip(*_events(runs, 1), strict=True)
    return _events(runs, max(LEAST_ROUNDS, min(ROUNDS, int(ROUNDS * SLOW / max(SLOW / ROUNDS, sum(probe))))))


def _events(runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each run in each round, by events on the stream; the runs take turns."""
    for run in runs:
        run()
    marks = [[(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in runs] for _ in range(rounds)]
    for round_ in marks:
        for run, (start, end) in zip(runs, round_, strict=True):
            start.record()
            run()
            end.record()
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) / 1e3 for start, end in column] for column in zip(*marks, strict=True)]


def _tensors(answer: Any) -> list[torch.Tensor]:
    return [answer] if isinstance(answer, torch.Tensor) else list(answer)
