"""The GPU suite, as far as it can be tried without one: its contests are right at small sizes, its verdicts fair."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tensors import DEVICE, TRITON_DTYPES, needs_triton

from bench.gpu import masked, packed, suite
from bench.gpu import tests as device_tests
from bench.gpu.lines import Lines, commit, gpu_table, versions
from bench.gpu.measure import Ceiling, error, quantiles, time_peers_once, works_still
from bench.gpu.suite import AGAIN, judged, line, watch, works
from bench.gpu.work import Goal, Work
from rankwise.kernels.backend import backend

ROOT = Path(__file__).parents[1]
SMALL = [*masked.works(70, 64, 32), *packed.works(64, 16, 96)]
ROW = {
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


@needs_triton
@pytest.mark.parametrize("work", SMALL, ids=lambda work: f"{work.id} {work.name}")
def test_ours_and_the_peers_give_the_answer(work: Work) -> None:
    """In PyTorch where the interpreter cannot do bf16."""
    torch.manual_seed(0)
    with backend("auto" if DEVICE == "cuda" else "torch"):
        contest = work.build(torch.device(DEVICE))
        assert error(contest.ours(), contest.reference()) <= contest.tolerance
    assert torch.bfloat16 in TRITON_DTYPES or DEVICE == "cpu"
    assert work.bytes > 0


def test_every_goal_names_a_peer_that_is_there() -> None:
    for work in SMALL:
        peers = work.build(torch.device("cpu")).peers
        for goal in work.goals:
            named = any(name.startswith(goal.peer) for name in peers)
            assert named or goal.peer == "torch.compile" or goal.figure in ("microseconds", "seconds", "bandwidth")


def test_the_suite_finds_its_families_and_picks_by_name() -> None:
    everything = works(None)
    assert {"engine", "masked", "packed"} <= {family for family, _ in everything}
    assert "models" not in suite.FAMILIES
    assert {work.id for _, work in works(["K1"])} == {"K1"}
    assert {family for family, _ in works(["masked"])} == {"masked"}
    assert len({(work.id, work.name) for _, work in everything}) == len(everything)


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


def test_a_line_says_what_was_missed() -> None:
    row = ROW | {"goals": [judged(Goal("bandwidth", 0.8), ROW)]}
    assert "5.00 us" in line(row)
    assert "missed: bandwidth" in line(row)
    assert "wrong answer" in line({"id": "K1", "name": "x", "failed": "wrong answer, not timed"})
    json.dumps(row)


def test_errors_are_relative_and_nan_is_no_answer() -> None:
    one = torch.ones(4)
    assert error(one, one) == 0
    assert error((one, one * 1.1), (one, one)) == pytest.approx(0.1, rel=1e-5)
    assert error(one * float("nan"), one) == float("inf")
    assert quantiles([1.0, 2.0, 3.0])["p50"] == 2.0


def row(name: str, **more: object) -> dict[str, object]:
    return {"family": "packed", "id": "K1", "name": name, **more}


def test_the_file_is_summed_up(tmp_path: Path) -> None:
    """Goals met and missed of the newest figures, lines that failed or were left out; other commits do not count."""
    facts = {"device": "D", "versions": {"torch": "2"}, "commit": "abc"}
    lines = Lines(tmp_path / "rows.jsonl", facts)
    Lines(lines.path, facts | {"commit": "old"}).write(row("from another commit", failed="no"))
    goals = [judged(Goal("bandwidth", at), ROW) for at in (0.6, 0.8)]
    figures = {key: ROW[key] for key in ("seconds", "speedup", "bandwidth")}
    lines.write({"id": "tests", "exit": 1, "summary": "1 failed", "failed_tests": ["a"]})
    lines.write({"id": "ceiling", "bandwidth": 3e12, "flops": 8e14})
    lines.write(row("measured", failed="first try"))
    lines.write(row("measured", **figures, goals=goals))
    lines.write(row("broken", failed="the process ended with -9"))
    lines.write(row("late", left_out="no time"))
    found = lines.summary()
    assert found["met"] == 1
    assert found["missed"] == ["K1 measured: bandwidth 0.7 for 0.8"]
    assert found["failed"] == ["K1 broken: the process ended with -9", "tests: 1 failed"]
    assert found["left_out"] == ["K1 late"]
    table = gpu_table(lines.rows())
    assert "| K1 | measured | 5.00 (4.00 to 6.00) | 70 % | 2.00 × dense cuBLAS | met: bandwidth" in table
    assert "3.00 TB/s" in table
    assert "another commit" not in table


def test_programs_that_are_not_there_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("RANKWISE_COMMIT", raising=False)
    assert commit() == "unknown"
    assert versions()["driver and clocks"] == ""


def no_work(name: str) -> Work:
    return Work("X", name, lambda device: None, 1)  # type: ignore[arg-type, return-value]


CHILD = """
import json, os, sys, time
start, out = int(sys.argv[sys.argv.index('--start') + 1]), sys.argv[sys.argv.index('--out') + 1]
for at in range(start, 8):
    {what}
    open(out, 'a').write(json.dumps(dict(family='f', id='X', name=str(at), commit='abc')) + '\\n')
    {then}
"""


def watched(tmp_path: Path, seconds: float = 60.0, what: str = "pass", then: str = "pass") -> list[dict[str, object]]:
    """Rows of eight lines that a child measures, each after `what` and before `then`."""
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(what=what, then=then))
    todo = [("f", no_work(str(at))) for at in range(8)]
    lines = Lines(tmp_path / "rows.jsonl", {"commit": "abc"})
    watch(lines, todo, time.time() + seconds, [sys.executable, str(script)])
    rows = lines.rows()
    assert [row["name"] for row in rows] == [str(at) for at in range(8)]
    return rows


def test_a_line_whose_process_dies_does_not_cost_the_others(tmp_path: Path) -> None:
    """A real child process for each stretch of lines, which ends itself at every third one."""
    rows = watched(tmp_path, what="if at % 3 == 2: os.abort()")
    assert [at for at, row in enumerate(rows) if "failed" in row] == [2, 5]


def test_a_line_that_leaves_the_device_unusable_costs_itself_alone(tmp_path: Path) -> None:
    rows = watched(tmp_path, then=f"if at % 3 == 2: os._exit({AGAIN})")
    assert not [row for row in rows if "failed" in row]


def test_a_process_that_ends_without_a_word_is_no_loop(tmp_path: Path) -> None:
    rows = watched(tmp_path, what="if at == 7: sys.exit()")
    assert [row.get("failed") for row in rows] == [None] * 7 + ["the process ended without a line"]


def test_a_line_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "PATIENCE", 1.0)
    rows = watched(tmp_path, what="if at == 3: time.sleep(600)")
    assert [at for at, row in enumerate(rows) if "failed" in row] == [3]
    assert rows[3]["failed"] == "no answer in 1 s"


def test_time_that_is_up_ends_a_line_and_leaves_the_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "GRACE", 1.0)
    rows = watched(tmp_path, 1.0, what="if at == 3: time.sleep(600)")
    assert [row.get("left_out") for row in rows] == [None] * 3 + ["no time to end it"] + ["no time"] * 4


@pytest.mark.parametrize("only", [None, ["engine"]])
def test_a_family_has_its_share_of_a_run_with_all(
    only: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a process ends behind the line that left the device unusable."""

    def slow(work: Work, *_: object) -> dict[str, object]:
        time.sleep(0.05)
        return {"failed": work.name}

    usable = iter([True, True, True, False])
    todo = [(family, no_work(f"{family} {at}")) for family in ("engine", "svd") for at in (1, 2, 3)]
    monkeypatch.setattr(suite, "works", lambda _: todo)
    monkeypatch.setattr(suite, "guarded", slow)
    monkeypatch.setattr(suite, "SHARES", {"engine": 0.01})
    monkeypatch.setattr(suite.timing, "ceiling", lambda _: Ceiling(1.0, 1.0))
    monkeypatch.setattr(suite.timing, "works_still", lambda _: next(usable))
    monkeypatch.setattr(suite.os, "_exit", sys.exit)
    lines = Lines(tmp_path / "rows.jsonl", {"commit": "abc"})
    with pytest.raises(SystemExit, match=str(AGAIN)):
        suite.measure(lines, Namespace(only=only, start=0, until=time.time() + 60))
    found = [row.get("left_out") for row in lines.rows()[1:]]
    assert found == ([None] * 4 if only else [None, "no time", "no time", None])


def test_peers_that_would_not_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    times, broken = time_peers_once({"good": lambda: 1, "bad": lambda: [][0]})
    assert set(times) == {"good"}
    assert broken == {"bad": "IndexError: list index out of range"}


def test_a_device_that_draws_no_numbers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    assert works_still(torch.device(DEVICE))

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    monkeypatch.setattr("torch.randn", refused)
    assert not works_still(torch.device(DEVICE))


@pytest.mark.parametrize("processes", [0, 2])
def test_verdicts_of_the_tests_are_read(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real run names every test as it comes, so that one that is stopped tells what was seen before."""
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")
    (folder / "test_native.py").write_text("def test_left_out(): assert False\n")
    (folder / "test_one.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', ['a b', 'c'])\n"
        "def test_good(x): pass\n"
        "def test_bad(): assert 1 - 1\n"
    )
    monkeypatch.setattr(device_tests, "ROOT", tmp_path)
    monkeypatch.setattr(device_tests, "WHOLE", ())
    monkeypatch.setattr(device_tests, "WORKERS", str(processes))
    found = device_tests.check(2)
    name = "tests/kernels/test_one.py::test_"
    assert (found["exit"], found["failed_tests"]) == (1, [f"{name}bad"])
    assert "1 failed, 2 passed" in found["summary"]
    stream = capsys.readouterr().out.split("FAILURES")[0]
    assert device_tests.said("PASSED", stream) == {f"{name}good[a b]", f"{name}good[c]"}
    assert device_tests.said("FAILED", stream) == {f"{name}bad"}


def test_tests_that_take_too_long_are_stopped() -> None:
    found = device_tests.check(0)
    assert (found["exit"], found["summary"]) == (None, "out of time: 0 failed, 0 passed until then")


def test_the_tests_that_run_on_the_device_are_there() -> None:
    assert all((ROOT / path).exists() for path in (*device_tests.WHOLE, device_tests.KERNELS))
    assert all((ROOT / device_tests.KERNELS / f"test_{name}.py").exists() for name in device_tests.LEFT_OUT)


def test_no_device_is_said_in_one_line(tmp_path: Path) -> None:
    if DEVICE == "cuda":
        pytest.skip("there is one")
    command = [sys.executable, "-m", "bench.gpu.suite", "--out", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "no CUDA device: this suite measures one")
    assert not list(tmp_path.iterdir())
