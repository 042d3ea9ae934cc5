"""Memory for weights that are read whole for every token: in huge pages, where Linux has them.

On a machine with small pages much of the time of a read goes into looking addresses up, most of all in a virtual one.
"""

import mmap
import weakref
from threading import Lock

import torch

PIECE = 32 << 20  # bytes that are asked for at once; those that nobody writes take no memory
HUGE = 2 << 20
ALIGN = 64

_last: list[tuple[weakref.ref[mmap.mmap], int]] = []  # where the last tensor lies, and how far its piece is taken
_one_at_a_time = Lock()


def placed(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a tensor, beside the ones before it; a piece of memory goes with the last tensor in it."""
    with _one_at_a_time:
        place = _take(-(-tensor.nbytes // ALIGN) * ALIGN)
    return place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _take(size: int) -> torch.Tensor:
    """So many bytes."""
    piece, taken = (_last[0][0](), _last[0][1]) if _last else (None, 0)
    if piece is None or taken + size > len(piece):
        piece = mmap.mmap(-1, max(size, PIECE) + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            piece.madvise(mmap.MADV_HUGEPAGE)
        taken = -torch.frombuffer(piece, dtype=torch.uint8).data_ptr() % HUGE
    _last[:] = [(weakref.ref(piece), taken + size)]
    return torch.frombuffer(piece, dtype=torch.uint8)[taken : taken + size]
