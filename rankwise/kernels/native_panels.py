"""Matrices as `native_linear.c` reads them: panels of 16 rows, 8 columns after another, in bf16 or in 4 bits."""

from dataclasses import dataclass

import torch

from rankwise.kernels.fragments import split_nibbles
from rankwise.kernels.int4 import Int4
from rankwise.kernels.native_memory import placed
from rankwise.kernels.nf4 import LEVELS, NF4

ROWS, CHUNK = 16, 8
MIDDLE = 8  # the code of int4 that stands for 0 without a zero point

Matrix = torch.Tensor | Int4 | NF4


@dataclass(frozen=True)
class Panels:
    """A matrix as the functions read it.

    Args:
        weights: bf16 `[panels, chunks, 4, 16, 2]` or, of codes, int16 `[panels, chunks, 32]`.
        scales: int32 `[panels, groups, 16]`, see `Scaling` in native_dot.h; None in bf16.
        levels: bf16 `[32]`, what codes stand for, twice; None in bf16.
        halves: scales are pairs of halves.
        shifted: codes have zero points.
        rows: m.
        columns: n.
    """

    weights: torch.Tensor
    scales: torch.Tensor | None
    levels: torch.Tensor | None
    halves: bool
    shifted: bool
    rows: int
    columns: int

    @property
    def chunks(self) -> int:
        """Of 8 columns, the last one filled up."""
        return self.weights.shape[1]

    @property
    def groups(self) -> int:
        """That share a scale; 1 in bf16."""
        return 1 if self.scales is None else self.scales.shape[1]

    @property
    def bytes(self) -> int:
        """That a product reads."""
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)


def panels_of(matrix: Matrix) -> Panels:
    """Lay a matrix out; it is copied."""
    return _plain(matrix) if isinstance(matrix, torch.Tensor) else _coded(matrix)


def _plain(weight: torch.Tensor) -> Panels:
    m, n = weight.shape
    filled = torch.nn.functional.pad(weight, (0, -n % CHUNK, 0, -m % ROWS))
    laid = filled.view(-1, ROWS, filled.shape[1] // CHUNK, CHUNK // 2, 2).permute(0, 2, 3, 1, 4)
    return Panels(placed(laid), None, None, False, False, m, n)


def _coded(w: Int4 | NF4) -> Panels:
    codes = split_nibbles(w.codes, high_first=isinstance(w, NF4))
    m, n = codes.shape
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -m % ROWS)).to(torch.int32)
    nibbles = filled.view(-1, ROWS, n // CHUNK, CHUNK // 2, 2).permute(0, 2, 1, 4, 3)  # panel chunk row parity j
    words = (nibbles << 4 * torch.arange(CHUNK // 2, dtype=torch.int32)).sum(-1).to(torch.int16).flatten(2)
    if isinstance(w, NF4):
        scales, levels, shifted = w.absmax.float().view(torch.int32), torch.tensor(LEVELS), False
    else:
        point = torch.full(w.scale.shape, MIDDLE) if w.zero is None else w.zero
        halves = w.scale.bfloat16(), (MIDDLE - point.float()).bfloat16()
        scales = torch.stack(halves, -1).view(torch.int32).flatten(1)
        levels, shifted = torch.arange(16.0) - MIDDLE, w.zero is not None
    laid = torch.nn.functional.pad(scales, (0, 0, 0, -m % ROWS)).view(-1, ROWS, scales.shape[1]).transpose(1, 2)
    return Panels(placed(words), placed(laid), levels.bfloat16().repeat(2), isinstance(w, Int4), shifted, m, n)


def rows_of(panels: Panels) -> torch.Tensor:
    """The matrix `[m, n]` in bf16 that panels stand for."""
    if panels.scales is None or panels.levels is None:
        whole = panels.weights.permute(0, 3, 1, 2, 4).reshape(-1, panels.chunks * CHUNK)
        return whole[: panels.rows, : panels.columns]
    nibbles = panels.weights.unflatten(2, (ROWS, 2))[..., None].int() >> 4 * torch.arange(4, dtype=torch.int32) & 15
    codes = nibbles.permute(0, 2, 1, 4, 3).reshape(-1, panels.columns)
    numbers = panels.levels.float().index_select(0, codes.flatten()).view(len(codes), panels.groups, -1)
    words = panels.scales.transpose(1, 2).contiguous().view(len(codes), panels.groups, 1)
    if not panels.halves:
        return (numbers * words.view(torch.float32)).flatten(1)[: panels.rows].bfloat16()
    scale, shift = words.view(torch.bfloat16).float().split(1, dim=-1)
    return ((numbers + shift) * scale).flatten(1)[: panels.rows].bfloat16()


def take_rows(panels: Panels, ids: torch.Tensor) -> torch.Tensor:
    """Rows `[T, n]` of a matrix in bf16, by their numbers `[T]`: an embedding that a head's panels hold."""
    found = panels.weights[ids // ROWS, :, :, ids % ROWS]
    return found.flatten(1)[:, : panels.columns].contiguous()
