"""Tensors of several processes brought together; nothing to do for a single process."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from rankwise.distributed import has_nccl, is_main, losses, meet, world

PIECE = 2**26  # numbers that are summed in one call: bounds the copies that a backend makes


def sum_to_main(tensor: torch.Tensor) -> None:
    """Add the tensors of all processes, in place, in the main process; the others' are of no use afterwards.

    Args:
        tensor: of one shape and dtype everywhere, contiguous; where `distributed.joined` was told to compute.
    """
    if world() == 1:
        return
    import torch.distributed as dist

    _in_pieces(tensor, lambda piece: dist.reduce(piece, 0))


def sum_everywhere(tensor: torch.Tensor) -> None:
    """Add the tensors of all processes, in place, in every process; the same bits in all.

    Args:
        tensor: as for `sum_to_main`.
    """
    if world() == 1:
        return
    import torch.distributed as dist

    _in_pieces(tensor, dist.all_reduce)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add the gradients of all processes, in place, in every process; a parameter without one has added nothing."""
    if world() == 1:
        return
    trained = list(parameters)
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    summed = torch.cat([gradient.flatten() for gradient in gradients])
    sum_everywhere(summed)
    for each, piece in zip(trained, summed.split([each.numel() for each in trained]), strict=True):
        each.grad = piece.view_as(each)


def _in_pieces(tensor: torch.Tensor, add: Callable[[torch.Tensor], Any]) -> None:
    meet()
    with losses():
        for piece in tensor.view(-1).split(PIECE):
            if piece.is_cuda and not has_nccl():
                staged = piece.cpu()
                add(staged)
                piece.copy_(staged)
            else:
                add(piece)


def rows_to_main(rows: list[torch.Tensor], total: int) -> list[torch.Tensor]:
    """All `total` tensors in the main process, in order; nothing in the others.

    Args:
        rows: this process's part, see `distributed.own`; in host memory, of one shape and dtype everywhere.
        total: how many all processes have together.
    """
    if world() == 1:
        return rows
    import torch.distributed as dist

    meet()
    with losses():
        if is_main():
            return [_received(rows, number) for number in range(total)]
        for row in rows:
            dist.send(row.contiguous().view(torch.uint8), 0)
    return []


def _received(rows: list[torch.Tensor], number: int) -> torch.Tensor:
    """Row `number` of all, in the main process."""
    at, source = divmod(number, world())
    if source == 0:
        return rows[at]
    import torch.distributed as dist

    row = torch.empty(rows[0].shape, dtype=rows[0].dtype)
    dist.recv(row.view(torch.uint8), source)
    return row
