"""Files that are whole or absent: atomic writes, hashes, room on the disk."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rankwise.errors import RankwiseError

CHECKSUMS = "SHA256SUMS"  # the format of coreutils: `sha256sum -c SHA256SUMS` works in the folder
CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)")


def is_disk_full(error: BaseException) -> bool:
    """True if `error` says that a disk (or a quota) has no room left."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    messages = ("No space left", "quota exceeded", "File too large")
    return isinstance(error, SafetensorError) and any(text in str(error) for text in messages)


@contextmanager
def disk_guard(path: Path) -> Iterator[None]:
    """Turn "disk full" inside the block into a RankwiseError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise RankwiseError(
            str(path), "no space left on the disk", "free some room and run the same command again"
        ) from error


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it.

    Readers see the old file or the whole new one. A failure leaves no trace.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with disk_guard(path):
            write(part)
            _flush(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, in its own order, atomically."""
    text = json.dumps(json_ready(data), indent=1, allow_nan=False) + "\n"
    _write_text(path, text)


def json_ready(data: Any) -> Any:
    """`data` with the numbers that JSON cannot say (NaN, infinities) as None."""
    if isinstance(data, Mapping):
        return {key: json_ready(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [json_ready(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def digest(data: Any, digits: int) -> str:
    """Hex digits that stand for JSON-ready data, for names of folders."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:digits]


def read_json(path: Path) -> Any:
    """Read JSON, or raise a RankwiseError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RankwiseError(str(path), "no such file", "a JSON file is expected") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RankwiseError(str(path), f"not readable as JSON ({error})", "a JSON file is expected") from None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file, atomically. Tensors are made contiguous and moved to the CPU."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, lambda part: save_file(ready, part, metadata=metadata))


def differing_keys(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The keys under which two identities differ, for an error message; empty if they are the same."""
    return ", ".join(sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read one safetensors file whole, or raise a RankwiseError that names it."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for lazy reading; damage becomes a RankwiseError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise RankwiseError(str(path), "no such file", "the folder is incomplete; write it again") from None
    except SafetensorError as error:
        hint = "the file is truncated or not safetensors; write it again"
        raise RankwiseError(str(path), str(error), hint) from None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS over every file of `folder` (not of its subfolders)."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != CHECKSUMS)
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in names)
    _write_text(folder / CHECKSUMS, lines)


def check_checksums(folder: Path, required: Collection[str] = ()) -> int:
    """Compare every file listed in SHA256SUMS; return how many were compared.

    Args:
        folder: holds the list.
        required: names that the list must contain.

    Raises:
        RankwiseError: for the first file that is missing or differs, or if the list is missing or damaged.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        raise RankwiseError(str(path), "no such file", "only checkpoints written by `rankwise` carry hashes")
    listed = dict(_checksum_lines(path))
    for name in required:
        if name not in listed:
            raise RankwiseError(str(path), f"{name} is not in it", "the list was changed; write the checkpoint again")
    for name, digest in listed.items():
        file = folder / name
        if not file.is_file():
            raise RankwiseError(str(file), "missing", f"{CHECKSUMS} lists it; write the checkpoint again")
        if sha256(file) != digest:
            raise RankwiseError(str(file), "its SHA-256 differs", "the file was changed or damaged")
    return len(listed)


def _checksum_lines(path: Path) -> Iterator[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        if not (match := CHECKSUM_LINE.fullmatch(line)):
            raise RankwiseError(str(path), f"line {line[:80]!r}", "a SHA-256, two spaces and a file name are expected")
        yield match[2], match[1]
    if not lines:
        raise RankwiseError(str(path), "empty", "the list was changed; write the checkpoint again")


def require_room(folder: Path, needed: int) -> None:
    """Raise a RankwiseError if the disk that holds `folder` has fewer than `needed` bytes free."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RankwiseError(
            str(folder),
            f"no space left on the disk ({free / 1e9:.2f} GB free)",
            f"{needed / 1e9:.2f} GB needed",
        )


def publish(staged: Path, final: Path) -> None:
    """Flush every file of the folder `staged`, then rename it to `final`."""
    for path in staged.iterdir():
        _flush(path)
    _flush(staged)
    os.rename(staged, final)
    _flush(final.parent)


def _write_text(path: Path, text: str) -> None:
    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    atomic_write(path, write)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where converted models and measurements are kept: `$RANKWISE_CACHE`, else `rankwise` below the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rankwise"
    return Path(os.environ.get("RANKWISE_CACHE", default))
