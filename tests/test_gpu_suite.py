"""The GPU suite, as far as it can be tried without one: its processes, its time, the tests that it runs."""

import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from tensors import DEVICE

from bench.gpu import suite
from bench.gpu import tests as device_tests
from bench.gpu.lines import Lines, commit, versions
from bench.gpu.measure import Ceiling
from bench.gpu.suite import AGAIN, watch
from bench.gpu.work import Work

ROOT = Path(__file__).parents[1]


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
