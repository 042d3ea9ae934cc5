"""Killed anywhere, the same command continues, and ends with the same bytes as one that was never interrupted."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rankwise.engine.checkpoint import verify
from rankwise.errors import RankwiseError
from rankwise.jobs import Job

CHANNELS = ["--set", "channel_multiple=4"]  # of the default method
SMALL = ["--samples", "4", "--gradient-samples", "2", "--seq-len", "32", "--measure", "1", "--rank-multiple", "1"]
RANDOM_KILLS = 20
WORK = ".out.rankwise"
Files = dict[str, bytes]

# ------------------------------------------------------------------------- what runs in the child processes
# A fork server that has torch and the package loaded already makes a child in milliseconds. The child finds its
# function by the path of this file, as test modules are not importable by name.

FORKS = multiprocessing.get_context("forkserver")
PRELOAD = [
    "torch._dynamo",
    "scipy.linalg",
    "pytest",
    "rankwise.pipeline",
    "rankwise.commands",
    "transformers.generation",
]
MODELS = ["models.llama.modeling_llama", "models.auto.modeling_auto", "models.auto.tokenization_auto"]
FORKS.set_forkserver_preload([*PRELOAD, *(f"transformers.{name}" for name in MODELS)])
CHILD = "import runpy; runpy.run_path(path, run_name='child')['child'](*arguments)"


@dataclass
class Fate:
    """What happens to a child.

    Args:
        at: number of the event at which it ends, from 0; None lets it live.
        how: signal that it sends to itself.
        when: `before` or `after` the event.
        events: `renames`, or `removals` (of files and folders).
    """

    at: int | None = None
    how: int = signal.SIGKILL
    when: str = "before"
    events: str = "renames"


def child(arguments: list[str], chosen: dict[str, Any], log: str, pipe: Any) -> None:
    """Run a command; note every event in the log; end as chosen, see `Fate`."""
    from rankwise.cli import main

    fate = Fate(**chosen)

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
    output = os.open(f"{log}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    count = 0

    def watch(original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*paths: Any, **options: Any) -> Any:
            nonlocal count
            number, count = count, count + 1
            with Path(log).open("a") as file:
                file.write(f"{paths[-1]}\n")
            if number == fate.at and fate.when == "before":
                os.kill(os.getpid(), fate.how)
            result = original(*paths, **options)
            if number == fate.at and fate.when == "after":
                os.kill(os.getpid(), fate.how)
            return result

        return watched

    for name in ("replace", "rename") if fate.events == "renames" else ("unlink", "remove", "rmdir"):
        setattr(os, name, watch(getattr(os, name)))
    if fate.events == "removals":
        os.scandir, os.listdir = worst_order(os.scandir, by_name=False), worst_order(os.listdir, by_name=True)
    pipe.send("started")
    main(arguments)


def worst_order(original: Callable[..., Any], *, by_name: bool) -> Any:
    """A folder's entries may come in any order; here, what says whose work it is comes first."""

    def key(entry: Any) -> tuple[bool, str]:
        name = entry if by_name else entry.name
        return not str(name).endswith(".json"), str(name)

    class Entries(list[Any]):
        """What `os.scandir` gives: to be read within its context, by the name it was given or the context's."""

        def __enter__(self) -> "Entries":
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing is open."""

    def ordered(*arguments: Any) -> Any:
        if by_name:
            return sorted(original(*arguments), key=key)
        with original(*arguments) as entries:
            return Entries(sorted(entries, key=key))

    return ordered


# ---------------------------------------------------------------------------------------------- the tests


@dataclass
class Result:
    """How a child ended: its exit code (negative: the signal), its events and what it printed."""

    code: int
    events: list[str]
    printed: str


@dataclass
class Task:
    """A job in a folder of its own.

    Args:
        place: the folder, where `out` is made.
        options: the command's.
    """

    place: Path
    options: list[str]
    runs: int = 0

    @property
    def out(self) -> Path:
        """The result."""
        return self.place / "out"

    def start(self, fate: Fate) -> tuple[Any, Path]:
        """A child that has everything loaded and begins now."""
        self.runs += 1
        log = self.place.with_name(f"{self.place.name}-log-{self.runs}")
        log.touch()
        ours, theirs = FORKS.Pipe()
        arguments = ["compress", *self.options, "--out", str(self.out)]
        names = {"path": __file__, "arguments": (arguments, asdict(fate), str(log), theirs)}
        process = FORKS.Process(target=exec, args=(CHILD, names))
        process.start()
        theirs.close()
        assert ours.recv() == "started"
        return process, log

    def run(self, fate: Fate | None = None, *more: str) -> Result:
        """Run the command to its end, whatever that is."""
        process, log = Task(self.place, [*self.options, *more], self.runs).start(fate or Fate())
        self.runs += 1
        return self.wait(process, log)

    def wait(self, process: Any, log: Path) -> Result:
        """Wait for a child."""
        process.join(timeout=120)
        assert process.exitcode is not None
        printed = log.with_name(f"{log.name}.out")
        shown = printed.read_text(errors="replace") if printed.exists() else ""
        return Result(process.exitcode, log.read_text().splitlines(), shown)


def contents(folder: Path) -> Files:
    """Every file of a folder, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def options(model_folder: Callable[[str], Path], text_file: Path) -> list[str]:
    how = ["--ratio", "0.6", "--no-refit", *CHANNELS]
    return [str(model_folder("llama")), "--calibration", str(text_file), *how, *SMALL]


@pytest.fixture(scope="module")
def uninterrupted(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, list[str], float]:
    """Bytes, events and seconds of a run that nobody disturbed."""
    place = tmp_path_factory.mktemp("reference") / "place"
    place.mkdir()
    task = Task(place, options)
    warm = task.run()
    assert warm.code == 0, warm.printed
    first = contents(task.out)
    shutil.rmtree(task.out)
    process, log = task.start(Fate())
    begin = time.perf_counter()
    result = task.wait(process, log)
    seconds = time.perf_counter() - begin
    assert result.code == 0
    assert contents(task.out) == first  # else nothing below means anything
    return first, result.events, seconds


@pytest.fixture
def task(tmp_path: Path, options: list[str]) -> Task:
    (tmp_path / "place").mkdir()
    return Task(tmp_path / "place", options)


def require_whole_or_absent(task: Task, expected: Files) -> bool:
    """True if the result is there, and then it is whole; nothing else beside it passes for a model."""
    there = task.out.exists()
    if there:
        assert contents(task.out) == expected
        assert verify(task.out) == len(expected) - 1
    for config in task.place.rglob("config.json"):
        if config.parent == task.out:
            continue
        try:
            model = AutoModelForCausalLM.from_pretrained(config.parent)
        except Exception:  # of whatever class: it does not load
            continue
        wanted = AutoModelForCausalLM.from_pretrained(task.out) if there else None
        state = model.state_dict()
        if wanted is not None:
            assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state_dict().items())
        stored = load_file(config.parent / "model.safetensors")
        assert hashlib.sha256((config.parent / "model.safetensors").read_bytes()).hexdigest() in str(
            expected["SHA256SUMS"]
        )
        assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    return there


def finish(task: Task, expected: Files) -> Result:
    """The same command again; whatever was there before, it leaves the result and nothing else."""
    result = task.run()
    assert result.code == 0, result.printed
    assert contents(task.out) == expected
    assert [path.name for path in task.place.iterdir()] == ["out"]
    return result


def delays(seconds: float) -> list[float]:
    """Random moments spread over the whole run."""
    draw = random.Random(20260731)
    return [seconds * (number + draw.random()) / RANDOM_KILLS for number in range(RANDOM_KILLS)]


@pytest.mark.parametrize("number", range(RANDOM_KILLS), ids=lambda n: f"kill-{n:02d}")
def test_killed_at_a_random_moment(number: int, task: Task, uninterrupted: tuple[Files, list[str], float]) -> None:
    expected, _, seconds = uninterrupted
    process, log = task.start(Fate())
    time.sleep(delays(seconds)[number])
    process.kill()
    ended = task.wait(process, log)
    assert ended.code in (-signal.SIGKILL, 0)
    if require_whole_or_absent(task, expected) and not (task.place / WORK).exists():
        return  # it was quicker this time
    finish(task, expected)


def test_the_run_renames_what_this_file_thinks(uninterrupted: tuple[Files, list[str], float]) -> None:
    """The points of the next test are all of: the job, moments, factors, the checkpoint's own files, the checkpoint."""
    names = [Path(event).name for event in uninterrupted[1]]
    expected = ["job.json", "curvature.json", "inputs_000", "outputs_001", "factors_001", "plan.json", "SHA256SUMS"]
    places = [next(i for i, name in enumerate(names) if name.startswith(wanted)) for wanted in expected]
    assert places == sorted(places)
    assert names.count("out") == 1
    assert len(names) >= 17


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("third", [0, 1, 2], ids=["begin", "middle", "end"])
def test_killed_at_every_rename(
    when: str, third: int, options: list[str], tmp_path: Path, uninterrupted: tuple[Files, list[str], float]
) -> None:
    """Every rename of the run, in three parts of it; all failures are shown, not only the first."""
    expected, events, _ = uninterrupted
    failures = {}
    for number in range(len(events)):
        if 3 * number // len(events) != third:
            continue
        (tmp_path / str(number)).mkdir()
        task = Task(tmp_path / str(number), options)
        ended = task.run(Fate(number, when=when))
        assert ended.code == -signal.SIGKILL, ended.printed
        try:
            require_whole_or_absent(task, expected)
            again = finish(task, expected)
            done = ended.events[: number + (when == "after")]
            costly = {event for event in done if Path(event).name.startswith(("inputs_", "factors_"))}
            assert not costly & set(again.events), "work was done twice"
        except (AssertionError, RankwiseError) as error:
            failures[f"{when} {Path(events[number]).name}"] = str(error)
    assert failures == {}


@pytest.mark.parametrize("number", [1, 6, 13])
def test_interrupted_from_the_keyboard(number: int, task: Task, uninterrupted: tuple[Files, list[str], float]) -> None:
    ended = task.run(Fate(number, how=signal.SIGINT, when="after"))
    assert ended.code == 130
    assert "Traceback" not in ended.printed
    assert ended.printed.rstrip().endswith("interrupted; the same command continues where this one stopped")
    assert not task.out.exists()
    finish(task, uninterrupted[0])


def test_killed_twice_and_continued(task: Task, uninterrupted: tuple[Files, list[str], float]) -> None:
    """Each run gets a little further than the one before."""
    expected, events, _ = uninterrupted
    for _ in range(4):
        assert task.run(Fate(2, when="after")).code == -signal.SIGKILL
    finished = finish(task, expected)
    assert 0 < len(finished.events) < len(events) - 5


OTHER = {
    "ratio": (["--ratio", "0.5"], "options"),
    "method": (["--method", "global"], "options"),
    "seed": (["--seed", "1"], "calibration"),
    "samples": (["--samples", "5"], "calibration"),
    "dtype": (["--dtype", "bf16"], "weights"),
    "curvature": (["--curvature", "elsewhere"], "curvature"),
    "refit": (["--refit"], "refit"),
    "heal": (["--heal", "3"], "heal"),
    "scores": (["--score-only"], "score_only"),
}


@pytest.mark.parametrize(("change", "word"), OTHER.values(), ids=OTHER)
def test_another_job_does_not_continue_this_one(
    change: list[str], word: str, task: Task, uninterrupted: tuple[Files, list[str], float]
) -> None:
    assert task.run(Fate(9)).code == -signal.SIGKILL
    work = {p.name: p.stat().st_mtime_ns for p in (task.place / WORK).rglob("*") if p.is_file() and p.name[0] != "."}
    refused = task.run(None, *change)
    assert refused.code == 2
    (line,) = [line for line in refused.printed.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out: ")
    assert f"{WORK} holds unfinished work with other " in line
    assert word in line
    assert line.endswith("finish that command, or pass --restart to throw its work away")
    assert refused.events == []
    assert work == {
        p.name: p.stat().st_mtime_ns for p in (task.place / WORK).rglob("*") if p.is_file() and p.name[0] != "."
    }
    finish(task, uninterrupted[0])


def test_restart_throws_unfinished_work_away(
    task: Task, tmp_path: Path, uninterrupted: tuple[Files, list[str], float]
) -> None:
    (tmp_path / "fresh").mkdir()
    other = ["--ratio", "0.5", "--sides", "one"]
    fresh = Task(tmp_path / "fresh", [*task.options, *other])
    assert fresh.run().code == 0
    assert contents(fresh.out) != uninterrupted[0]
    assert task.run(Fate(14)).code == -signal.SIGKILL
    restarted = task.run(None, *other, "--restart")
    assert restarted.code == 0, restarted.printed
    assert contents(task.out) == contents(fresh.out)
    assert [path.name for path in task.place.iterdir()] == ["out"]


def test_restart_of_the_same_job_begins_anew(task: Task, uninterrupted: tuple[Files, list[str], float]) -> None:
    expected, events, _ = uninterrupted
    assert task.run(Fate(14)).code == -signal.SIGKILL
    restarted = task.run(None, "--restart")
    assert restarted.code == 0, restarted.printed
    assert len(restarted.events) == len(events)
    assert contents(task.out) == expected


def test_one_process_at_a_time(task: Task, uninterrupted: tuple[Files, list[str], float]) -> None:
    assert task.run(Fate(9)).code == -signal.SIGKILL
    identity = json.loads((task.place / WORK / "job.json").read_text())
    with Job.open(task.out, identity):
        refused = task.run()
    assert refused.code == 2
    (line,) = [line for line in refused.printed.splitlines() if line.startswith("error: ")]
    assert "another process is" in line
    assert str(task.place) in line
    finish(task, uninterrupted[0])


def test_a_finished_result_is_not_touched(task: Task, uninterrupted: tuple[Files, list[str], float]) -> None:
    finish(task, uninterrupted[0])
    before = {path.name: path.stat().st_mtime_ns for path in task.out.iterdir()}
    again = task.run()
    assert again.code == 2
    assert "out: " in again.printed
    assert "allowed: a folder that does not exist yet" in again.printed
    assert before == {path.name: path.stat().st_mtime_ns for path in task.out.iterdir()}
    assert not (task.place / WORK).exists()


def test_work_is_not_lost_to_a_folder_that_somebody_else_made(
    task: Task, uninterrupted: tuple[Files, list[str], float]
) -> None:
    """An empty folder where the result should be is no result."""
    assert task.run(Fate(14)).code == -signal.SIGKILL
    task.out.mkdir()
    refused = task.run()
    assert refused.code == 2
    assert refused.printed.count("error: ") == 1
    assert list(task.out.iterdir()) == []
    task.out.rmdir()
    assert len(finish(task, uninterrupted[0]).events) < len(uninterrupted[1]) - 10


def test_killed_while_a_curvature_folder_is_filled(
    task: Task, tmp_path: Path, uninterrupted: tuple[Files, list[str], float]
) -> None:
    """A folder given with --curvature outlives the job, and serves the next."""
    more = ["--curvature", str(tmp_path / "moments")]
    for number in (1, 5, 4):
        ended = task.run(Fate(number), *more)
        assert ended.code == -signal.SIGKILL, ended.printed
    assert task.run(None, *more).code == 0
    assert contents(task.out) == uninterrupted[0]
    left = sorted(path.name for path in (tmp_path / "moments").iterdir() if path.name != ".lock")
    assert left == ["curvature.json", *(f"{what}_00{i}.safetensors" for what in ("inputs", "outputs") for i in (0, 1))]


REMOVALS = {"finishing": [], "restarting": ["--restart"]}


@pytest.mark.parametrize("more", REMOVALS.values(), ids=REMOVALS)
def test_killed_while_cleaning_up(
    more: list[str], task: Task, tmp_path: Path, uninterrupted: tuple[Files, list[str], float]
) -> None:
    """Whatever is left of a job's folder, another job in its place must not take it for its own work."""
    other = ["--ratio", "0.5", "--sides", "one"]
    (tmp_path / "fresh").mkdir()
    fresh = Task(tmp_path / "fresh", [*task.options, *other])
    assert fresh.run().code == 0
    expected = contents(fresh.out)
    assert task.run(Fate(14 if more else len(uninterrupted[1]) - 1, when="after")).code == -signal.SIGKILL
    started = task.place.rename(tmp_path / "started")
    failures = {}
    for number in (0, 1, 2, 3, 5, 8, 12, 17, 23, 30):
        shutil.copytree(started, task.place)
        ended = task.run(Fate(number, events="removals"), *(other if more else []), *more)
        if ended.code != -signal.SIGKILL:
            break
        left = sorted(str(path.relative_to(task.place / WORK)) for path in (task.place / WORK).rglob("*"))
        if task.out.exists():
            shutil.rmtree(task.out)
        result = task.run(None, *other)
        wrong = result.code == 0 and contents(task.out) != expected
        if wrong or result.code not in (0, 2):
            failures[f"before removal {number}, with {left} left"] = "wrong bytes" if wrong else result.printed
        shutil.rmtree(task.place)
    assert number > 5
    assert failures == {}


# ------------------------------------------------------------------------------- masks, refit, teacher, healing

TRAINED = ["--method", "ara", *(f"--set={setting}" for setting in ("steps=6", "save_every=2", "train_len=16"))]
STAGES = {
    "all": [*TRAINED, "--refit", "--heal", "25"],
    "scores": [*TRAINED, "--score-only"],
}
SEEN = {  # what the run renames, in this order
    "all": "factors_001 training masks refit.json refit_001 teacher_00005 heal plan.json SHA256SUMS",
    "scores": "factors_001 training masks choices scores.json",
}


def deep(folder: Path) -> Files:
    """Every file below a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def staged(
    options: list[str], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[str], Files, list[str]]]:
    """Options, bytes and events of an undisturbed run with these stages, made once."""
    made: dict[str, tuple[list[str], Files, list[str]]] = {}

    def make(name: str) -> tuple[list[str], Files, list[str]]:
        if name not in made:
            place = tmp_path_factory.mktemp("staged") / name
            place.mkdir()
            refitted = [option for option in options if option not in ("--no-refit", *CHANNELS)]
            task = Task(place, [*refitted, "--learn", str(text_file), "--learn-samples", "4", *STAGES[name]])
            result = task.run()
            assert result.code == 0, result.printed
            made[name] = task.options, deep(task.out), [Path(event).name for event in result.events]
        return made[name]

    return make


@pytest.mark.parametrize("name", STAGES)
def test_the_stages_rename_what_this_file_thinks(name: str, staged: Callable[[str], Any]) -> None:
    _, _, events = staged(name)
    places = [next(i for i, event in enumerate(events) if event.startswith(wanted)) for wanted in SEEN[name].split()]
    assert places == sorted(places)
    assert events[-1] == "out"
    assert events.count("training.safetensors") == 3
    assert events.count("heal.safetensors") == (2 if name == "all" else 0)


@pytest.mark.parametrize(("at", "when"), [(2, "after"), (4, "before")], ids=["after-3", "before-5"])
@pytest.mark.parametrize("name", STAGES)
def test_killed_again_and_again_in_every_stage(
    name: str, at: int, when: str, tmp_path: Path, staged: Callable[[str], Any]
) -> None:
    """Each run gets a few files further; what a stage has finished is not done again, and the bytes are the same."""
    options, expected, events = staged(name)
    (tmp_path / "place").mkdir()
    task, done = Task(tmp_path / "place", options), list[str]()
    for _ in range(len(events)):
        ended = task.run(Fate(at, when=when))
        done += [Path(event).name for event in ended.events[: at + (when == "after")]]
        assert ended.code in (-signal.SIGKILL, 0), ended.printed
        if ended.code == 0 or "plan.json" in done or "scores.json" in done:
            break
    if ended.code != 0:
        ended = task.run()
        done += [Path(event).name for event in ended.events]
    assert ended.code == 0, ended.printed
    assert deep(task.out) == expected
    assert [path.name for path in task.place.iterdir()] == ["out"]
    once = ("inputs_", "factors_", "training", "refit", "teacher_", "heal")
    assert [event for event in done if event.startswith(once)] == [event for event in events if event.startswith(once)]


def test_killed_in_the_middle_of_training_and_healing(tmp_path: Path, staged: Callable[[str], Any]) -> None:
    """Between two saves, by an exception; the steps since the last one are run again."""
    options, expected, events = staged("all")
    (tmp_path / "place").mkdir()
    task = Task(tmp_path / "place", options)
    second = events.index("training.safetensors") + 1
    last = len(events) - 1 - events[::-1].index("heal.safetensors")
    for at, name in ((second, "training.safetensors"), (last - second, "heal.safetensors")):
        ended = task.run(Fate(at, how=signal.SIGINT))
        assert ended.code == 130, ended.printed
        assert Path(ended.events[-1]).name == name
    finished = task.run()
    assert finished.code == 0, finished.printed
    assert deep(task.out) == expected


def test_children_use_the_same_python() -> None:
    """The fork server runs this interpreter, with this package."""
    assert Path(sys.executable).exists()
    assert FORKS.get_start_method() == "forkserver"
