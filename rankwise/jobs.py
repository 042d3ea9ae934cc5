"""Unfinished work: a folder beside the result, owned by one process at a time, continued by the same command."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rankwise.distributed import barrier, is_main
from rankwise.errors import RankwiseError
from rankwise.files import differing_keys, json_ready, read_json, write_json

JOB = "job.json"


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Own a folder while the context lasts; the system gives it back when the process ends, however it ends.

    Args:
        folder: made if missing.
        wait: wait for another owner instead of raising.

    Raises:
        RankwiseError: another process owns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise RankwiseError(str(folder), "another process is working in it", "wait until it has ended") from None
    finally:
        os.close(handle)


def claim(folder: Path, what: str, identity: dict[str, Any]) -> None:
    """Files `WHAT_*.safetensors` belong to what `WHAT.json` beside them says; those of another are not continued.

    Args:
        folder: made if missing.
        what: the files' name, and the field of the error.
        identity: what they belong to.

    Raises:
        RankwiseError: the folder was made with another identity, or holds such files and nothing that says whose.
    """
    path, hint = folder / f"{what}.json", "use a new folder, or --restart"
    if not path.exists():
        if any(folder.glob(f"{what}_*.safetensors")):
            raise RankwiseError(what, f"{folder} (no {path.name} in it)", hint)
        write_json(path, identity)
    if different := differing_keys(read_json(path), json_ready(identity)):
        raise RankwiseError(what, f"{folder} was made with other {different}", hint)


def work_folder(out: Path) -> Path:
    """Where the unfinished work on the result `out` lies."""
    return out.absolute().with_name(f".{out.name}.rankwise")


def is_unfinished(out: Path) -> bool:
    """True if work on `out` was begun and not cleaned up."""
    return (work_folder(out) / JOB).exists()


def is_free(out: Path, restart: bool) -> bool:
    """True if nothing is at `out` but, without `restart`, what unfinished work may have put there last."""
    return not os.path.lexists(out) or (is_unfinished(out) and not restart)


class Job:
    """The work folder `.<out>.rankwise` of one result.

    Args:
        folder: the work folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def open(cls, out: Path, identity: dict[str, Any], *, restart: bool = False) -> Iterator["Job"]:
        """Start, or continue, the job that makes `out`. Of several processes the main one owns it.

        Args:
            out: the result's folder.
            identity: what the job is; must equal what an unfinished job was started with.
            restart: throw unfinished work away first.

        Raises:
            RankwiseError: unfinished work of another job, or another process is at it.
        """
        folder = work_folder(out)
        with locked(folder) if is_main() else nullcontext():
            job = cls(folder)
            try:
                if is_main():
                    job._claim(identity, restart=restart)
                barrier()
                yield job
            finally:
                if is_main() and not any(entry.name != JOB for entry in folder.iterdir()):
                    shutil.rmtree(folder, ignore_errors=True)  # finished, or failed before any work was done

    def finish(self) -> None:
        """Remove the work; the result is in place. The job's name goes last, so that a kill here is no error."""
        self._clear(keep=JOB)

    def _clear(self, keep: str) -> None:
        for entry in self.folder.iterdir():
            if entry.name != keep:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _claim(self, identity: dict[str, Any], *, restart: bool) -> None:
        path = self.folder / JOB
        if restart:  # the job's name goes last: work without one would be taken for this job's
            self._clear(keep=JOB)
            path.unlink(missing_ok=True)
        if not path.exists():
            write_json(path, identity)
        if different := differing_keys(read_json(path), identity):
            reason = f"{self.folder} holds unfinished work with other {different}"
            raise RankwiseError("out", reason, "finish that command, or pass --restart to throw its work away")
