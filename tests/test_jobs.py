"""Unfinished work belongs to one process and one command at a time."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import RankwiseError
from rankwise.jobs import Job, claim, is_unfinished, locked

IDENTITY: dict[str, Any] = {"model": "a", "options": {"ratio": 0.8, "kinds": ["dense"]}, "plan": None}
HOLDER = """
import sys, time
from pathlib import Path
from rankwise.jobs import Job
with Job.open(Path(sys.argv[1]), {"model": "a"}) as job:
    (job.folder / "work").write_text("half done")
    print("holding", flush=True)
    time.sleep(60)
"""


def start(out: Path, identity: dict[str, Any] = IDENTITY, *, leave: bool = True, **options: Any) -> None:
    """A run that gets as far as one file and then fails (or finishes)."""
    try:
        with Job.open(out, identity, **options) as job:
            (job.folder / "below").mkdir(exist_ok=True)
            (job.folder / "below" / "file").write_text("work")
            if leave:
                raise InterruptedError
            job.finish()
    except InterruptedError:
        pass


def raise_interrupted(*args: Any, **kwargs: Any) -> None:
    raise InterruptedError


def test_work_lies_beside_the_result_and_goes_when_done(tmp_path: Path) -> None:
    with Job.open(tmp_path / "out", IDENTITY) as job:
        assert job.folder == tmp_path / ".out.rankwise"
        assert job.folder.is_dir()
        job.finish()
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_finds_its_work(tmp_path: Path) -> None:
    start(tmp_path / "out")
    with Job.open(tmp_path / "out", IDENTITY) as job:
        assert (job.folder / "below" / "file").read_text() == "work"


def test_relative_and_absolute_names_are_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start(Path("out"))
    with Job.open(tmp_path / "out", IDENTITY) as job:
        assert (job.folder / "below" / "file").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"model": "b"}, "model", id="value"),
        pytest.param({"options": {"ratio": 0.7, "kinds": ["dense"]}}, "options", id="nested"),
        pytest.param({"seed": 1}, "seed", id="new-key"),
        pytest.param({"model": "b", "plan": "{}"}, "model, plan", id="two"),
    ],
)
def test_another_command_is_told_what_differs(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    start(tmp_path / "out")
    with (
        pytest.raises(RankwiseError, match=f"other {named}; .*--restart"),
        Job.open(tmp_path / "out", IDENTITY | change),
    ):
        pytest.fail("opened")
    with Job.open(tmp_path / "out", IDENTITY) as job:  # the work is still there
        assert (job.folder / "below" / "file").exists()


def test_restart_throws_the_work_away(tmp_path: Path) -> None:
    start(tmp_path / "out")
    with Job.open(tmp_path / "out", {"model": "b"}, restart=True) as job:
        assert [path.name for path in job.folder.iterdir() if not path.name.startswith(".")] == ["job.json"]
        (job.folder / "new").write_text("work")
    with (
        pytest.raises(RankwiseError, match="other model, options"),
        Job.open(tmp_path / "out", IDENTITY),
    ):
        pytest.fail("opened")
    with Job.open(tmp_path / "out", {"model": "b"}) as job:
        assert (job.folder / "new").read_text() == "work"


def test_a_job_that_fails_before_any_work_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError), Job.open(tmp_path / "out", IDENTITY):
        raise InterruptedError
    assert list(tmp_path.iterdir()) == []
    with Job.open(tmp_path / "out", IDENTITY | {"model": "b"}):  # so nothing stands in the way of another command
        pass


def test_a_first_claim_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TypeError), Job.open(tmp_path / "out", {"model": object()}):
        pytest.fail("opened")
    assert list(tmp_path.iterdir()) == []


def test_a_later_claim_that_fails_leaves_the_work(tmp_path: Path) -> None:
    start(tmp_path / "out")
    with pytest.raises(RankwiseError), Job.open(tmp_path / "out", {"model": object()}):
        pytest.fail("opened")
    assert (tmp_path / ".out.rankwise" / "below" / "file").exists()


def test_a_kill_while_cleaning_up_still_counts_as_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert not is_unfinished(out)
    start(out)
    assert is_unfinished(out)
    monkeypatch.setattr("shutil.rmtree", raise_interrupted)
    with pytest.raises(InterruptedError), Job.open(out, IDENTITY) as job:
        job.finish()
    monkeypatch.undo()
    assert is_unfinished(out)
    start(out, leave=False)
    assert not is_unfinished(out)
    assert list(tmp_path.iterdir()) == []


def test_damaged_job_file_is_named(tmp_path: Path) -> None:
    start(tmp_path / "out")
    (tmp_path / ".out.rankwise" / "job.json").write_text("{")
    with pytest.raises(RankwiseError, match=r"job\.json"), Job.open(tmp_path / "out", IDENTITY):
        pytest.fail("opened")


def test_two_jobs_side_by_side_do_not_meet(tmp_path: Path) -> None:
    with Job.open(tmp_path / "a", IDENTITY) as first, Job.open(tmp_path / "b", {"model": "b"}) as second:
        assert first.folder != second.folder


def test_a_locked_folder_has_one_owner_until_the_end(tmp_path: Path) -> None:
    with locked(tmp_path / "folder"):
        with pytest.raises(RankwiseError, match="another process") as caught, locked(tmp_path / "folder"):
            pytest.fail("locked twice")
        assert caught.value.field == str(tmp_path / "folder")
    with pytest.raises(InterruptedError), locked(tmp_path / "folder"):
        raise InterruptedError
    with locked(tmp_path / "folder"):
        pass


def test_waiting_for_a_locked_folder_works(tmp_path: Path) -> None:
    events: list[str] = []

    def second() -> None:
        with locked(tmp_path / "folder", wait=True):
            events.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path / "folder"):
        thread.start()
        thread.join(0.2)
        events.append("first")
    thread.join(10)
    assert events == ["first", "second"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        for restart in (False, True):
            with (
                pytest.raises(RankwiseError, match="another process"),
                Job.open(out, {"model": "a"}, restart=restart),
            ):
                pytest.fail("opened")
        assert (tmp_path / ".out.rankwise" / "work").read_text() == "half done"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with Job.open(out, {"model": "a"}) as job:  # the lock died with its process, the work did not
            assert (job.folder / "work").read_text() == "half done"
            job.finish()
    finally:
        holder.kill()
        holder.wait()
    assert list(tmp_path.iterdir()) == []


def test_files_belong_to_what_the_folder_says(tmp_path: Path) -> None:
    """Tuples and numbers that JSON cannot say are no other identity."""
    identity = {"kinds": ("dense", "pivot"), "loss": float("nan"), "layers": {"a": {"indices": (0, 2)}}}
    claim(tmp_path / "new" / "place", "things", identity)
    claim(tmp_path / "new" / "place", "things", identity)
    with pytest.raises(RankwiseError, match=r"^things: .*place was made with other kinds, more; use a new folder, or"):
        claim(tmp_path / "new" / "place", "things", identity | {"kinds": ("dense",), "more": 1})
    assert [path.name for path in (tmp_path / "new" / "place").iterdir()] == ["things.json"]


def test_files_that_nobody_claimed_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / "others_000.safetensors").touch()
    claim(tmp_path, "things", {})
    (tmp_path / "things.json").unlink()
    (tmp_path / "things_000.safetensors").touch()
    with pytest.raises(RankwiseError, match=r"^things: .* \(no things.json in it\); use a new folder, or --restart$"):
        claim(tmp_path, "things", {})
