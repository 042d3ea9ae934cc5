"""Several processes at one job: the same plan as one process, no hang when one fails or is killed, and resumption."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prose import prose

from rankwise import distributed
from rankwise.alloc.exchange import rows_to_main
from rankwise.files import read_tensors

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["rankwise.pipeline", "rankwise.commands", "transformers.models.llama.modeling_llama"])
CHILD = "import runpy; runpy.run_path(path, run_name='child')['child'](*arguments)"
# Two processes have unequal parts of the windows, and of three one has no gradient window.
CHANNELS = ["--set", "channel_multiple=4"]  # of the default method
SMALL = ["--samples", "5", "--gradient-samples", "2", "--seq-len", "32", "--measure", "0", "--rank-multiple", "1"]
GONE = "is gone; run the same command again, it continues"


@dataclass
class Fate:
    """What sets one process apart.

    Args:
        rank: whose it is.
        after: it kills itself when it next meets the others after this file of the job was written; None lets it live.
        folder: it works here, not in the job's.
    """

    rank: int = 1
    after: str | None = None
    folder: str | None = None


def child(arguments: list[str], environment: dict[str, str], log: str, after: str | None, folder: str) -> None:
    """One process of a job: the command line's own entry, as a launcher would start it."""
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from rankwise import distributed
    from rankwise.alloc import exchange
    from rankwise.cli import main

    torch.set_num_threads(1)
    os.chdir(folder)
    meet = distributed.meet

    def watched(error: Exception | None = None) -> None:
        if after and Path(after).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        meet(error)

    distributed.meet = exchange.meet = watched
    main(arguments)


@dataclass
class Ended:
    """Exit codes (negative: the signal) and what was printed, by rank."""

    codes: list[int | None]
    printed: list[str]

    @property
    def lines(self) -> list[str]:
        """Everything that all processes printed."""
        return [line for text in self.printed for line in text.splitlines()]


@dataclass
class Place:
    """A job in a folder of its own."""

    folder: Path
    options: list[str]
    runs: int = 0

    @property
    def out(self) -> Path:
        """The result."""
        return self.folder / "out"

    @property
    def arguments(self) -> list[str]:
        """The command."""
        return ["compress", *self.options, "--out", str(self.out), "--curvature", str(self.folder / "moments")]

    def run(self, world: int, *more: str, fate: Fate | None = None) -> Ended:
        """The command in so many processes, to their end; a single one knows nothing of a launcher."""
        self.runs += 1
        fate, port = fate or Fate(), free_port()
        logs = [self.folder / f"log-{self.runs}-{rank}" for rank in range(world)]
        processes = []
        for rank, log in enumerate(logs):
            own = fate if rank == fate.rank else Fate()
            where = own.folder or str(self.folder)
            arguments = [*self.arguments, *more], launch(rank, world, port), str(log), own.after, where
            names = {"path": __file__, "arguments": arguments}
            processes.append(FORKS.Process(target=exec, args=(CHILD, names)))
            processes[-1].start()
        for process in processes:
            process.join(timeout=120)
            process.kill()
        return Ended([process.exitcode for process in processes], [log.read_text() for log in logs])

    def layers(self) -> dict[str, Any]:
        """Kind and rank of every layer."""
        plan = json.loads((self.out / "plan.json").read_text())
        return {name: (layer["kind"], layer["rank"]) for name, layer in plan["layers"].items()}

    def moments(self) -> dict[str, torch.Tensor]:
        """Every tensor of the curvature."""
        files = sorted((self.folder / "moments").glob("*puts_*.safetensors"))
        return {f"{file.name} {name}": tensor for file in files for name, tensor in read_tensors(file).items()}


def launch(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher puts into the environment."""
    if world == 1:
        return {}
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in known.items()}


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal up to the rounding of sums in fp32: within 1e-5 of a matrix's largest number."""
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5 * float(wanted[name].abs().max()))


@pytest.fixture(scope="module")
def options(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    how, text = ["--ratio", "0.6", "--no-refit", *CHANNELS], tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(prose(20_000, seed=3), encoding="utf-8")
    return [str(model_folder("llama")), "--calibration", str(text), *how, *SMALL]


@pytest.fixture
def place(tmp_path: Path, options: list[str]) -> Place:
    return Place(tmp_path, options)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> Place:
    """What one process makes of the job."""
    place = Place(tmp_path_factory.mktemp("single"), options)
    ended = place.run(1)
    assert ended.codes == [0], ended.printed
    return place


@pytest.mark.parametrize("world", [2, 3])
def test_the_plan_of_one_process(world: int, place: Place, single: Place) -> None:
    ended = place.run(world, "--json")
    assert ended.codes == [0] * world, ended.printed
    assert place.layers() == single.layers()
    require_close(place.moments(), single.moments())
    assert '"ratio"' in ended.printed[0]
    assert not any("input moments" in text or "ratio" in text for text in ended.printed[1:])
    assert not (place.folder / ".out.rankwise").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--score-only"],
        ["--ratio", "1", "--weights", "int4", "--group", "32", "--keep", "*.down_proj", "--sides", "one"],
    ],
    ids=["scores", "rounding"],
)
def test_other_jobs(more: list[str], place: Place) -> None:
    ended = place.run(2, *more)
    assert ended.codes == [0, 0], ended.printed
    assert place.out.is_dir()


MASKS = ["--set", "steps=6", "--set", "batch=3", "--set", "train_len=16", "--set", "save_every=2", "--method"]


def trained(place: Place) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Every mask's importances, and the log's lines, of an unfinished job."""
    folder = place.folder / ".out.rankwise" / "learning"
    lines = (folder / "training.jsonl").read_text().splitlines()
    return read_tensors(folder / "masks.safetensors"), [json.loads(line) for line in lines]


def cut_short(place: Place, method: str, world: int) -> None:
    """The job up to a disk that takes no checkpoint; what was learnt lies in the job's folder."""
    blocked = place.folder / ".out.rankwise" / "checkpoint"
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("in the way")
    ended = place.run(world, *MASKS, method)
    assert set(ended.codes) != {0}
    blocked.unlink()


@pytest.mark.parametrize(("method", "world"), [("ara", 2), ("ara", 4), ("llrc", 2), ("dobi-svd", 2)])
def test_masks_are_those_of_one_process(
    method: str, world: int, place: Place, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Three sequences a step, which two processes share unequally, and of which a fourth process has none."""
    place.options = [option for option in place.options if option not in CHANNELS]
    alone = Place(tmp_path_factory.mktemp("alone"), place.options)
    cut_short(alone, method, 1)
    cut_short(place, method, world)
    (wanted, steps), (found, lines) = trained(alone), trained(place)
    assert found.keys() == wanted.keys()
    for name, importance in found.items():
        torch.testing.assert_close(importance, wanted[name], rtol=0, atol=1e-4)
    for line, step in zip(lines, steps, strict=True):
        for key in line.keys() - {"seconds"}:
            assert line[key] == pytest.approx(step[key], rel=1e-3, abs=1e-6), key
    for each, count in ((alone, 1), (place, world)):
        assert each.run(count, *MASKS, method).codes == [0] * count
    assert place.layers() == alone.layers()


def test_a_training_goes_on_without_the_process_that_was_killed(place: Place, single: Place) -> None:
    """Which shows that it took part, too."""
    place.options = [option for option in place.options if option not in CHANNELS]
    ended = place.run(2, *MASKS, "ara", fate=Fate(1, ".out.rankwise/learning/training.safetensors"))
    assert ended.codes == [2, -signal.SIGKILL], ended.printed
    assert [line for line in ended.lines if "error" in line] == [f"error: process 0: another of the 2 processes {GONE}"]
    log = (place.folder / ".out.rankwise/learning/training.jsonl").read_text().splitlines()
    assert 2 <= len(log) < 6
    cut_short(place, "ara", 1)
    assert trained(place)[1][:2] == [json.loads(line) for line in log[:2]]  # seconds included: not run again
    assert place.run(1, *MASKS, "ara").codes == [0]
    whole = Place(place.folder / "whole", place.options)
    whole.folder.mkdir()
    assert whole.run(1, *MASKS, "ara").codes == [0]
    assert place.layers() == whole.layers() != single.layers()


FACTORED = ".out.rankwise/factors/factors_000.safetensors"


@pytest.mark.parametrize(
    ("rank", "after", "again"),
    [
        (1, "moments/outputs_001.safetensors", 3),
        (0, FACTORED, 1),
    ],
)
def test_a_killed_process(rank: int, after: str, again: int, place: Place, single: Place) -> None:
    """The other one ends with one line; the same command goes on from the files, in as many processes as there are."""
    ended = place.run(2, fate=Fate(rank, after))
    assert ended.codes[rank] == -signal.SIGKILL
    assert ended.codes[1 - rank] == 2
    assert [line for line in ended.lines if "error" in line] == [
        f"error: process {1 - rank}: another of the 2 processes {GONE}"
    ]
    assert "Traceback" not in "".join(ended.printed)
    assert not place.out.exists()
    before = {path: path.stat().st_mtime_ns for path in (place.folder / "moments").glob("inputs_*")}
    assert before
    ended = place.run(again)
    assert ended.codes == [0] * again, ended.printed
    assert place.layers() == single.layers()
    require_close(place.moments(), single.moments())
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())


BAD = {
    "option": (["--ratio", "7"], "error: ratio: 7.0;"),
    "main": (["--curvature", "{file}"], "error: {file}: "),  # only the main process opens it
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_one_line_of_all(case: str, place: Place, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    more, expected = BAD[case]
    ended = place.run(2, *(part.format(file=file) for part in more))
    assert ended.codes == [2, 2], ended.printed
    (line,) = ended.lines
    assert line.startswith(expected.format(file=file))
    assert not (place.folder / ".out.rankwise").exists()


@pytest.mark.parametrize("other", [None, "Another text, as long as it must be. " * 400], ids=["none", "another"])
def test_an_error_that_one_process_meets(other: str | None, place: Place, text_file: Path) -> None:
    """Process 1 has no text, or another one, under the same name."""
    there = place.folder / "there"
    there.mkdir()
    (place.folder / "text.txt").write_text(text_file.read_text())
    if other:
        (there / "text.txt").write_text(other)
    ended = place.run(2, "--calibration", "text.txt", fate=Fate(1, folder=str(there)))
    assert ended.codes == [2, 2], ended.printed
    (line,) = [line for line in ended.lines if "error" in line]
    assert line.startswith("error: model or text: process 1" if other else "error: text: text.txt (FileNotFoundError)")
    assert (line in ended.printed[0]) == bool(other)


def test_torchrun(place: Place, single: Place) -> None:
    """One of two processes is killed: torchrun ends. The job goes on, here in processes of our own for speed."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rankwise"]
    with (place.folder / "log").open("w") as log:
        launcher = subprocess.Popen([sys.executable, *command, *place.arguments], stdout=log, stderr=log)
        while not (place.folder / "moments" / "inputs_000.safetensors").exists() and launcher.poll() is None:
            time.sleep(0.002)
        children = psutil.Process(launcher.pid).children(recursive=True)
        (victim,) = [process for process in children if process.environ().get("RANK") == "1"]
        victim.kill()
        assert launcher.wait(timeout=120) != 0
    assert not any(process.is_running() for process in children)
    assert not place.out.exists()
    ended = place.run(2)
    assert ended.codes == [0, 0], ended.printed
    assert place.layers() == single.layers()


def test_a_single_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [torch.ones(2)]
    for name, value in launch(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    assert distributed.world() == 1  # two were launched, but none joined: the Python API in somebody's training script
    assert rows_to_main(rows, 1) is rows
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.joined("cpu"):
        assert distributed.from_main(lambda: 3) == 3
    assert not torch.distributed.is_initialized()
