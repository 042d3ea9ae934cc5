"""Matrices as `native_linear.c` reads them: panels of 16 rows, 8 columns after another, in bf16, 8 or 4 bits."""

from dataclasses import dataclass

import torch

from rankwise.kernels.fragments import split_nibbles
from rankwise.kernels.int4 import Int4
from rankwise.kernels.int8 import MOST, Int8, dequantize_int8
from rankwise.kernels.native_memory import placed
from rankwise.kernels.nf4 import LEVELS, NF4

ROWS, CHUNK = 16, 8
MIDDLE = 8  # the code of int4 that stands for 0 without a zero point
SIGN = 128  # the bit of int8's codes, which are laid out as sign and magnitude

Matrix = torch.Tensor | Int4 | NF4 | Int8


@dataclass(frozen=True)
class Panels:
    """A matrix as the functions read it.

    Args:
        weights: bf16 `[panels, chunks, 4, 16, 2]`; of codes of 4 bits int16 `[panels, chunks, 32]`, of 8 bits uint8
            `[panels, chunks, 2, 4, 2, 4, 2]`, see `numbers8` in native_dot.h.
        scales: int32 `[panels, groups, 16]`, int16 where halves stand alone, see `Scaling` in native_dot.h; None in
            bf16.
        levels: what codes stand for: of 4 bits bf16 `[32]`, twice, of 8 bits uint8 `[2, 128]`, the bytes of their
            magnitudes in bf16; None in bf16.
        halves: scales are halves: with a shift each where codes have zero points, else alone.
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
    def bits(self) -> int:
        """Of a weight: 16, 8 or 4."""
        return 16 if self.scales is None else 8 if self.weights.dtype == torch.uint8 else 4

    @property
    def groups(self) -> int:
        """That share a scale; 1 in bf16 and in 8 bits."""
        return 1 if self.scales is None else self.scales.shape[1]

    @property
    def bytes(self) -> int:
        """That a product reads."""
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)


def panels_of(matrix: Matrix) -> Panels:
    """Lay a matrix out; it is copied."""
    if isinstance(matrix, Int8):
        return _eight(matrix)
    return _plain(matrix) if isinstance(matrix, torch.Tensor) else _coded(matrix)


def _plain(weight: torch.Tensor) -> Panels:
    m, n = weight.shape
    filled = torch.nn.functional.pad(weight, (0, -n % CHUNK, 0, -m % ROWS))
    laid = filled.view(-1, ROWS, filled.shape[1] // CHUNK, CHUNK // 2, 2).permute(0, 2, 3, 1, 4)
    return Panels(placed(laid), None, None, False, False, m, n)


def _eight(w: Int8) -> Panels:
    if bool((w.codes < -MOST).any()):  # no code of ours, and without a place beside a sign
        return _plain(dequantize_int8(w, torch.bfloat16))
    m, n = w.codes.shape
    signed = w.codes.abs().view(torch.uint8) | torch.where(w.codes < 0, SIGN, 0).to(torch.uint8)
    filled = torch.nn.functional.pad(signed, (0, -n % CHUNK, 0, -m % ROWS))
    laid = filled.view(-1, 4, 4, filled.shape[1] // CHUNK, 2, 2, 2).permute(0, 3, 4, 1, 5, 2, 6)
    scales = torch.nn.functional.pad(w.scale.float(), (0, 0, 0, -m % ROWS)).view(torch.int32).view(-1, 1, ROWS)
    levels = torch.arange(MOST + 1).bfloat16().view(torch.uint8).view(-1, 2).T.contiguous()
    return Panels(placed(laid), placed(scales), levels, False, False, m, n)


def _coded(w: Int4 | NF4) -> Panels:
    codes = split_nibbles(w.codes, high_first=isinstance(w, NF4))
    m, n = codes.shape
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -m % ROWS)).to(torch.int32)
    nibbles = filled.view(-1, ROWS, n // CHUNK, CHUNK // 2, 2).permute(0, 2, 1, 4, 3)  # panel chunk row parity j
    words = (nibbles << 4 * torch.arange(CHUNK // 2, dtype=torch.int32)).sum(-1).to(torch.int16).flatten(2)
    if isinstance(w, NF4):
        scales, levels, shifted = w.absmax.float().view(torch.int32), torch.tensor(LEVELS), False
    else:
        scales, levels, shifted = w.scale.bfloat16().view(torch.int16), torch.arange(16.0) - MIDDLE, w.zero is not None
        if w.zero is not None:
            halves = w.scale.bfloat16(), (MIDDLE - w.zero.float()).bfloat16()
            scales = torch.stack(halves, -1).view(torch.int32).flatten(1)
    laid = torch.nn.functional.pad(scales, (0, 0, 0, -m % ROWS)).view(-1, ROWS, scales.shape[1]).transpose(1, 2)
    return Panels(placed(words), placed(laid), levels.bfloat16().repeat(2), isinstance(w, Int4), shifted, m, n)


def rows_of(panels: Panels) -> torch.Tensor:
    """The matrix `[m, n]` in bf16 that panels stand for."""
    if panels.scales is None or panels.levels is None:
        whole = panels.weights.permute(0, 3, 1, 2, 4).reshape(-1, panels.chunks * CHUNK)
        return whole[: panels.rows, : panels.columns]
    if panels.bits == 8:
        return _rows_of_eight(panels)
    nibbles = panels.weights.unflatten(2, (ROWS, 2))[..., None].int() >> 4 * torch.arange(4, dtype=torch.int32) & 15
    codes = nibbles.permute(0, 2, 1, 4, 3).reshape(-1, panels.columns)
    numbers = panels.levels.float().index_select(0, codes.flatten()).view(len(codes), panels.groups, -1)
    words = panels.scales.transpose(1, 2).contiguous().view(len(codes), panels.groups, 1)
    if panels.shifted:
        scale, shift = words.view(torch.bfloat16).float().split(1, dim=-1)
        return ((numbers + shift) * scale).flatten(1)[: panels.rows].bfloat16()
    scale = words.view(torch.bfloat16 if panels.halves else torch.float32).float()
    return (numbers * scale).flatten(1)[: panels.rows].bfloat16()


def _rows_of_eight(panels: Panels) -> torch.Tensor:
    assert panels.scales is not None
    codes = panels.weights.permute(0, 3, 5, 1, 2, 4, 6).reshape(-1, panels.chunks * CHUNK)
    codes = codes[: panels.rows, : panels.columns]
    return (_signed(codes) * panels.scales.view(torch.float32).view(-1, 1)[: panels.rows]).bfloat16()


def take_rows(panels: Panels, ids: torch.Tensor) -> torch.Tensor:
    """Rows `[T, n]` of a matrix in bf16 or 8 bits, by their numbers `[T]`: an embedding that a head's panels hold."""
    panel, row = ids // ROWS, ids % ROWS
    if panels.scales is None:
        return panels.weights[panel, :, :, row].flatten(1)[:, : panels.columns].contiguous()
    signed = panels.weights[panel, :, :, row // 4, :, row % 4].flatten(1)[:, : panels.columns]
    scale = panels.scales.view(torch.float32)[panel, 0, row]
    return (_signed(signed) * scale[:, None]).bfloat16()


def _signed(codes: torch.Tensor) -> torch.Tensor:
    """What sign and magnitude say, in int8."""
    return torch.where(codes < SIGN, 1, -1).to(torch.int8) * (codes & MOST).view(torch.int8)
