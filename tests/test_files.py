"""Files are whole or absent, whatever happens while they are written."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from rankwise import files
from rankwise.errors import RankwiseError
from rankwise.files import (
    CHECKSUMS,
    atomic_write,
    check_checksums,
    disk_guard,
    is_disk_full,
    open_tensors,
    publish,
    read_json,
    read_tensors,
    require_room,
    sha256,
    write_checksums,
    write_json,
    write_tensors,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, -2], dtype=torch.int32)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_with(number: int) -> Callable[[Path], None]:
    """A writer that gets half of its file done."""

    def write(part: Path) -> None:
        part.write_text("half")
        raise OSError(number, os.strerror(number))

    return write


# --- atomic_write -----------------------------------------------------------------------------------------------------


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "file"
    seen = []

    def write(part: Path) -> None:
        part.write_text("new")
        seen.append(path.read_text() if path.exists() else None)

    atomic_write(path, write)
    atomic_write(path, write)
    assert seen == [None, "new"]
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("old", [None, "old"], ids=["first-write", "overwrite"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=["disk", "quota", "file-size"])
def test_full_disk_is_said_plainly_and_leaves_nothing(number: int, old: str | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)
    with pytest.raises(RankwiseError, match="no space left on the disk") as caught:
        atomic_write(path, fail_with(number))
    assert caught.value.field == str(path)
    assert names(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_text() == old


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failures_after_the_write_leave_the_old_file(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if function == "fsync" else (Path, "replace")), fail)
    with pytest.raises(RankwiseError, match="no space left"):
        atomic_write(path, lambda part: part.write_text("new") and None)
    monkeypatch.undo()
    assert names(tmp_path) == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), KeyboardInterrupt(), KeyError("x")])
def test_other_failures_pass_through_and_leave_nothing(error: BaseException, tmp_path: Path) -> None:
    def write(part: Path) -> None:
        part.write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        atomic_write(tmp_path / "file", write)
    assert caught.value is error
    assert names(tmp_path) == []


def test_data_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flush"), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda *args: (events.append("rename"), replace(*args))[1])
    write_json(tmp_path / "file", {})
    assert events[:2] == ["flush", "rename"]


def test_a_part_left_by_a_killed_process_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / ".file.part").write_text("x" * 100)
    write_json(tmp_path / "file", [1])
    assert names(tmp_path) == ["file"]
    assert read_json(tmp_path / "file") == [1]


# --- a disk that is really full ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    write_tensors(small_disk / "t", TENSORS, {})
    write_json(small_disk / "j", {"old": 1})
    with pytest.raises(RankwiseError, match="no space left on the disk"):
        write_tensors(small_disk / "t", {"a": torch.zeros(2**20)}, {})
    with pytest.raises(RankwiseError, match="no space left on the disk"):
        write_json(small_disk / "j", "x" * 2**21)
    assert names(small_disk) == ["j", "t"]
    assert torch.equal(read_tensors(small_disk / "t")["a"], TENSORS["a"])
    assert read_json(small_disk / "j") == {"old": 1}


@pytest.mark.parametrize("what", ["json", "tensors"])
def test_a_limit_on_file_size_is_a_full_disk_too(what: str, tmp_path: Path) -> None:
    call = {
        "json": "write_json(path, 'x' * 100_000)",
        "tensors": "write_tensors(path, {'a': torch.zeros(100_000)}, {})",
    }
    program = f"""
import resource, sys, torch
from pathlib import Path
from rankwise.errors import RankwiseError
from rankwise.files import write_json, write_tensors
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    {call[what]}
except RankwiseError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "no space left on the disk" in result.stdout, result.stderr[-500:]
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "full"),
    [
        pytest.param(OSError(errno.ENOSPC, ""), True, id="os-disk"),
        pytest.param(OSError(errno.EDQUOT, ""), True, id="os-quota"),
        pytest.param(OSError(errno.ENOENT, ""), False, id="os-other"),
        pytest.param(SafetensorError("I/O error: No space left on device (os error 28)"), True, id="tensors-disk"),
        pytest.param(SafetensorError("I/O error: Disk quota exceeded (os error 122)"), True, id="tensors-quota"),
        pytest.param(SafetensorError("I/O error: File too large (os error 27)"), True, id="tensors-file-size"),
        pytest.param(SafetensorError("HeaderTooLarge"), False, id="tensors-other"),
        pytest.param(ValueError("No space left"), False, id="foreign"),
    ],
)
def test_which_errors_mean_a_full_disk(error: Exception, full: bool) -> None:
    assert is_disk_full(error) is full


def test_disk_guard_lets_other_errors_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_guard(tmp_path):
        (tmp_path / "none").read_text()


def test_require_room_compares_with_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 3_000_000_000})
    asked = []
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: asked.append(path) or usage)
    require_room(tmp_path, 3_000_000_000)
    with pytest.raises(RankwiseError, match=r"no space left .*\(3\.00 GB free\); 3\.50 GB needed"):
        require_room(tmp_path / "not" / "yet", 3_500_000_000)
    assert asked == [tmp_path, tmp_path]  # the nearest folder that exists


def test_require_room_takes_relative_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_room(Path("not/yet"), 1)
    with pytest.raises(RankwiseError, match="no space left"):
        require_room(Path("not/yet"), 2**62)


# --- JSON and tensors -------------------------------------------------------------------------------------------------


def test_json_keeps_order_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "j", {"b": 1, "a": [0.1, None, "ä"]})
    text = (tmp_path / "j").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert list(read_json(tmp_path / "j").items()) == [("b", 1), ("a", [0.1, None, "ä"])]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_numbers_that_json_cannot_say_become_null(value: float, tmp_path: Path) -> None:
    write_json(tmp_path / "j", {"x": [value, 1.5], "y": {"z": value}})
    assert read_json(tmp_path / "j") == {"x": [None, 1.5], "y": {"z": None}}


def test_what_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    write_json(tmp_path / "j", "old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "j", {"x": {1, 2}})
    assert names(tmp_path) == ["j"]
    assert read_json(tmp_path / "j") == "old"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"", "not readable as JSON"), (b"{", "not readable"), (b"\xff\xfe", "not readable")],
    ids=["missing", "empty", "cut", "binary"],
)
def test_unreadable_json_names_the_file(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "j"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RankwiseError, match=reason) as caught:
        read_json(path)
    assert caught.value.field == str(path)


def test_tensors_round_trip_bit_by_bit(tmp_path: Path) -> None:
    strided = torch.randn(4, 6).T
    special = torch.tensor([float("inf"), -0.0, 1e-45])
    half = torch.randn(3).bfloat16()
    tensors = {**TENSORS, "strided": strided, "special": special, "half": half, "grad": torch.ones(2).requires_grad_()}
    write_tensors(tmp_path / "t", tensors, {"note": "x"})
    found = read_tensors(tmp_path / "t")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach())
    with open_tensors(tmp_path / "t") as file:
        assert file.metadata()["note"] == "x"


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "text"])
def test_damaged_tensor_files_are_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tensors(path, TENSORS, {})
    raw = path.read_bytes()
    contents = {"truncated": raw[:-4], "empty": b"", "text": b"not tensors at all"}
    path.unlink() if damage == "missing" else path.write_bytes(contents[damage])
    with pytest.raises(RankwiseError) as caught:
        read_tensors(path)
    assert caught.value.field == str(path)
    assert "write it again" in caught.value.allowed


# --- checksums --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "sealed"
    folder.mkdir()
    (folder / "a.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "b with space").write_text("b")
    (folder / "below").mkdir()
    (folder / "below" / "c").write_text("c")
    write_checksums(folder)
    return folder


def test_coreutils_agrees(sealed: Path) -> None:
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"
    (sealed / "a.bin").write_text("abc")
    assert sha256(sealed / "a.bin") == known
    write_checksums(sealed)
    assert (sealed / CHECKSUMS).read_text().startswith(f"{known}  a.bin\n")
    assert check_checksums(sealed) == 2
    checked = subprocess.run(["sha256sum", "-c", CHECKSUMS], cwd=sealed, capture_output=True, text=True, check=False)
    assert checked.stdout == "a.bin: OK\nb with space: OK\n"


@pytest.mark.parametrize("byte", [0, 2500, 5119])
def test_one_flipped_bit_is_found(byte: int, sealed: Path) -> None:
    raw = bytearray((sealed / "a.bin").read_bytes())
    raw[byte] ^= 1
    (sealed / "a.bin").write_bytes(raw)
    with pytest.raises(RankwiseError, match="SHA-256 differs") as caught:
        check_checksums(sealed)
    assert caught.value.field == str(sealed / "a.bin")


def test_a_missing_file_is_found(sealed: Path) -> None:
    (sealed / "b with space").unlink()
    with pytest.raises(RankwiseError, match="b with space: missing"):
        check_checksums(sealed)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\n", b"no digest here\n", b"\xff\xfe\x00"],
    ids=["missing", "empty", "blank", "nonsense", "binary"],
)
def test_a_damaged_list_is_found(content: bytes | None, sealed: Path) -> None:
    (sealed / CHECKSUMS).unlink()
    if content is not None:
        (sealed / CHECKSUMS).write_bytes(content)
    with pytest.raises(RankwiseError, match=CHECKSUMS):
        check_checksums(sealed)


def test_publish_moves_the_whole_folder_at_once(sealed: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in sealed.iterdir() if path.is_file()}
    publish(sealed, tmp_path / "final")
    assert names(tmp_path) == ["final"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "final").iterdir() if p.is_file()} == before


def test_publish_replaces_nothing(sealed: Path, tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "mine").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        publish(sealed, final)
    assert names(final) == ["mine"]
    assert check_checksums(sealed) == 2
