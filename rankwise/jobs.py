"""Unfinished work: a folder beside the result, owned by one process at a time, continued by the same command."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.files import read_json, write_json

JOB = "job.json"


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
        """Start, or continue, the job that makes `out`.

        Args:
            out: the result's folder, not there yet.
            identity: what the job is; must equal what an unfinished job was started with.
            restart: throw unfinished work away first.

        Raises:
            RankwiseError: unfinished work of another job, or another process is at it.
        """
        folder = out.absolute().with_name(f".{out.name}.rankwise")
        fresh = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RankwiseError("out", str(out), "another process is writing it; wait for that one") from None
            job = cls(folder)
            try:
                job._claim(identity, restart=restart)
                yield job
            except BaseException:
                if fresh and not (folder / JOB).exists():
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    def finish(self) -> None:
        """Remove the work folder; the result is in place."""
        shutil.rmtree(self.folder)

    def _claim(self, identity: dict[str, Any], *, restart: bool) -> None:
        path = self.folder / JOB
        if restart:
            for entry in self.folder.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if not path.exists():
            write_json(path, identity)
        found = read_json(path)
        different = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
        if different:
            reason = f"{self.folder} holds unfinished work with other {', '.join(different)}"
            raise RankwiseError("out", reason, "finish that command, or pass --restart to throw its work away")
