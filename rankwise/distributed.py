"""Several processes at one job, by torch.distributed: which one this is, what they exchange, how they end together.

Only inside `joined` are there several; elsewhere, and without a launcher such as torchrun, every function here is that
of a single process. The main process, rank 0, owns the job's folder and writes what is common.

Before anything is exchanged all processes meet (`meet`). One that has failed comes to the next meeting to say so; all
others raise its error there. So nobody waits for a process that has stopped working. Processes that were killed are
known by their closed connections.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from rankwise.errors import RankwiseError

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
PATIENCE = timedelta(days=14)  # the others wait this long for what the main process does by itself
GRACE = 2.0  # seconds; launchers end all processes as soon as one has ended, and the one that prints shall be it

T = TypeVar("T")


class EndedError(RankwiseError):
    """Why this process must end, though it met no error of its own."""


class LostError(EndedError):
    """Another process is gone."""


@dataclass
class _State:
    rank: int = 0
    world: int = 1
    nccl: bool = False
    speaker: int = 0  # the rank that prints an error


_state = _State()


def rank() -> int:
    """Number of this process, from 0."""
    return _state.rank


def world() -> int:
    """Number of processes."""
    return _state.world


def has_nccl() -> bool:
    """True if tensors on GPUs can be exchanged as they are."""
    return _state.nccl


def is_main() -> bool:
    """True in the process that owns the job."""
    return _state.rank == 0


def launched() -> bool:
    """True if a launcher started this process as one of several."""
    return all(name in os.environ for name in LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def speaks() -> bool:
    """True where an error is to be printed, before, in and after `joined`: where it was met, else in rank 0."""
    return not launched() or int(os.environ["RANK"]) == _state.speaker


def tell(text: str) -> None:
    """Write an error's line on stderr where it is to be printed; the other processes give that one time to do so."""
    if speaks():
        sys.stderr.write(text)
    else:
        time.sleep(GRACE)


def own(total: int) -> range:
    """Which of `total` things are this process's part: every `world()`-th, so that rank 0 has the first."""
    return range(rank(), total, world())


@contextmanager
def joined(device: str) -> Iterator[None]:
    """All launched processes work together while the context lasts; a single one just goes on.

    Args:
        device: where processes compute, see `zoo.resolve_device`; `cuda` is then the GPU of the local rank. Sums go
            over NCCL where each process of a machine has a GPU of its own, over gloo otherwise.

    Raises:
        RankwiseError: `device` names one GPU for all; or another process failed (its error), or is gone.
    """
    if not launched():
        yield
        return
    _start(device)
    try:
        yield
        meet()  # nobody leaves before all are done
    except LostError:
        raise
    except Exception as error:
        if not isinstance(error, EndedError):
            with suppress(LostError):
                meet(error)
        _stop()
        raise
    _stop()


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, which runs it by itself while the others wait.

    Args:
        make: called in the main process only; returns what can be pickled.
    """
    if world() == 1:
        return make()
    made: Any = None
    if is_main():
        with _alone():
            made = make()
    meet()
    return _broadcast(made, 0)


def gather(value: T) -> list[T]:
    """Every process's value, by rank, in every process; values that can be pickled."""
    if world() == 1:
        return [value]
    meet()
    return [_broadcast(value, source) for source in range(world())]


def barrier() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        meet()


def require_same(what: str, value: Any) -> None:
    """Raise a RankwiseError unless `value` is the same in all processes; `what` names it."""
    for number, other in enumerate(gather(value)):
        if other != value:
            raise RankwiseError(what, f"process {number} has another than process {rank()}", "give all the same files")


@contextmanager
def _alone() -> Iterator[None]:
    """The main process needs no other while the context lasts."""
    together, _state.world = _state.world, 1
    try:
        yield
    finally:
        _state.world = together


def _start(name: str) -> None:
    import torch
    import torch.distributed as dist

    from rankwise.zoo import resolve_device

    device = resolve_device(name)
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if device.type == "cuda":
        if device.index is not None:
            raise RankwiseError("device", f"{device} with {count} processes", "allowed: auto, cpu, cuda")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", number)) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if here <= torch.cuda.device_count() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    _state.rank, _state.world, _state.nccl = number, count, backend != "gloo"


def _stop() -> None:
    import torch.distributed as dist

    _state.rank, _state.world, _state.nccl = 0, 1, False
    dist.destroy_process_group()


def meet(error: Exception | None = None) -> None:
    """All processes come here, before whatever they exchange; if one brings an error, the others raise it."""
    import torch
    import torch.distributed as dist

    failed = torch.tensor([error is not None], dtype=torch.int32)
    with losses():
        dist.all_reduce(failed)
    if not failed:
        return
    told = [_broadcast(None if error is None else _words(error), source) for source in range(world())]
    _state.speaker, words = next((number, words) for number, words in enumerate(told) if words)
    if error is None:
        raise EndedError(*words)


def _words(error: Exception) -> tuple[str, str, str]:
    """An error as the arguments of a RankwiseError."""
    if isinstance(error, RankwiseError):
        return error.field, error.value if isinstance(error.value, str) else repr(error.value), error.allowed
    return f"process {rank()}", f"{type(error).__name__}: {error}", "its own message says more"


def _broadcast(value: Any, source: int) -> Any:
    import torch
    import torch.distributed as dist

    box = [value]
    with losses():
        dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]


@contextmanager
def losses() -> Iterator[None]:
    """A connection that broke becomes one line."""
    try:
        yield
    except RuntimeError as error:
        _state.speaker = rank()
        hint = "run the same command again, it continues"
        raise LostError(f"process {rank()}", f"another of the {world()} processes is gone", hint) from error
