"""The GPU suite, as far as it can be tried without one: its contests are right at small sizes, its verdicts fair."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensors import DEVICE, TRITON_DTYPES, needs_triton

from bench.gpu import masked, packed
from bench.gpu.lines import Lines, commit, gpu_table, versions
from bench.gpu.measure import error, quantiles
from bench.gpu.suite import judged, line, watch, works
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
    assert {"masked", "packed"} <= {family for family, _ in everything}
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


def test_a_line_whose_process_dies_does_not_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child process for each stretch of lines, which ends itself at every third one."""
    monkeypatch.chdir(ROOT)
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\n"
        "start, out = int(sys.argv[sys.argv.index('--start') + 1]), sys.argv[sys.argv.index('--out') + 1]\n"
        "for at in range(start, 8):\n"
        "    if at % 3 == 2: os.abort()\n"
        "    row = {'family': 'f', 'id': 'X', 'name': str(at), 'commit': 'abc'}\n"
        "    open(out, 'a').write(json.dumps(row) + '\\n')\n"
    )
    todo = [("f", Work("X", str(at), lambda device: None, 1)) for at in range(8)]  # type: ignore[arg-type, return-value]
    lines = Lines(tmp_path / "rows.jsonl", {"commit": "abc"})
    watch(lines, todo, 0.0, [sys.executable, str(script)])
    rows = lines.rows()
    assert [row["name"] for row in rows] == [str(at) for at in range(8)]
    assert [at for at, row in enumerate(rows) if "failed" in row] == [2, 5]


def test_no_device_is_said_in_one_line(tmp_path: Path) -> None:
    if DEVICE == "cuda":
        pytest.skip("there is one")
    command = [sys.executable, "-m", "bench.gpu.suite", "--out", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "no CUDA device: this suite measures one")
    assert not list(tmp_path.iterdir())
