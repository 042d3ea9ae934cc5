"""Which numbers 4 and 8 bits can say: grids of `int4`, `nf4` and `int8`, and the scales of groups that lose least.

A number is stored as `level · scale`: int4's levels are `code - zero`, nf4's are a table, int8's the codes. Round-to-
nearest puts the largest number of a group on the outermost level; a smaller scale clips that one and says all others
more finely. The search tries a row of scales, of both signs for symmetric int4, and weighs the squared error of each
column by what it costs: the input's second moment, or with error feedback what later columns cannot make up for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from rankwise.errors import RankwiseError
from rankwise.kernels.fragments import join_nibbles
from rankwise.kernels.int4 import GROUPS, Int4
from rankwise.kernels.int8 import MOST, Int8
from rankwise.kernels.nf4 import BLOCK, LEVELS, NF4
from rankwise.kernels.quantized import Stored, dequantize, quantize

NAMES = ("int4", "nf4", "int8")
SHRINK = (0.5, 1.15, 30)  # scales that are tried, times that of round-to-nearest: from, to, how many
MIDDLE = 8  # the zero point of symmetric int4


@dataclass(frozen=True)
class Grid:
    """A format of 4 or 8 bits.

    Args:
        name: `int4`, `nf4` or `int8`.
        group: columns that share a scale: 32, 64 or 128 for int4, 64 for nf4; None for int8: all of a row.
        symmetric: int4 without zero points; the others have none.

    Raises:
        RankwiseError: a name or group that the kernels do not have.
    """

    name: str = "int4"
    group: int | None = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[int | None, ...]] = {"int4": GROUPS, "nf4": (BLOCK,), "int8": (None,)}
        if self.name not in allowed:
            raise RankwiseError("grid", self.name, f"allowed: {', '.join(NAMES)}")
        if self.group not in allowed[self.name]:
            raise RankwiseError("group", self.group, f"of {self.name}: {', '.join(map(str, allowed[self.name]))}")

    def width(self, columns: int) -> int:
        """Of the columns of a matrix, those that share a scale; 1 at least."""
        return self.group or max(columns, 1)

    def levels(self, x: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The levels nearest to numbers in units of their scale; `zero` broadcasts with them."""
        if self.name == "int4":
            return torch.clamp(x.round(), -zero, 15 - zero)
        if self.name == "int8":
            return x.round().clamp(-MOST, MOST)
        table, between = _table(x.dtype, x.device)
        return table[torch.bucketize(x.contiguous(), between)]

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale as the file keeps it: bf16 for int4, that and not negative for int8, fp32 and so for nf4."""
        if self.name == "int4":
            return scale.bfloat16().to(scale.dtype)
        return (scale.bfloat16() if self.name == "int8" else scale.float()).abs().to(scale.dtype)

    def nearest(self, w: torch.Tensor) -> Stored:
        """Round-to-nearest, as the kernels' own functions do it."""
        return quantize(w.contiguous(), self.name, self.group, self.symmetric)


class Scales(NamedTuple):
    """One of each for a group of a row, `[m, n / group]` fp64.

    Args:
        scale: as stored.
        zero: 0..15; 8 everywhere if symmetric; only int4 looks at it.
    """

    scale: torch.Tensor
    zero: torch.Tensor


def search_scales(w: torch.Tensor, weights: torch.Tensor, grid: Grid) -> Scales:
    """The scale (and zero) of each group for which `Σ_j weights_j (w_j - ŵ_j)²` is least among those tried.

    Args:
        w: `[m, n]` fp64; `grid.group` divides n, if there is one. The search is in fp32.
        weights: `[n]`, not negative.
        grid: the format.
    """
    width = grid.width(w.shape[1])
    groups = w.float().unflatten(1, (-1, width))
    cost = (weights / weights.max().clamp_min(1e-300)).float().unflatten(0, (-1, width))
    best = error = None
    for scale, zero in _candidates(groups, grid):
        off = groups - grid.levels(groups * reciprocal(scale), zero) * scale
        found = (off.square() * cost).sum(2, keepdim=True)
        if best is None or error is None:
            best, error = Scales(scale, zero), found
            continue
        better = found < error
        error = torch.where(better, found, error)
        best = Scales(torch.where(better, scale, best.scale), torch.where(better, zero, best.zero))
    assert best is not None
    return Scales(best.scale[..., 0].to(w.dtype), best.zero[..., 0].to(w.dtype))


def _candidates(groups: torch.Tensor, grid: Grid) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scales and zeros `[m, n / group, 1]`; the first is that of round-to-nearest."""
    one_less = 8 / 7 if grid.symmetric else 15 / 14  # the group's largest number a code further in
    factors = [1.0, one_less, *torch.linspace(*SHRINK).tolist()]
    most, least = groups.amax(2, keepdim=True).clamp(min=0), groups.amin(2, keepdim=True).clamp(max=0)
    middle = torch.full_like(most, MIDDLE)
    if grid.name != "int4":
        outermost = MOST if grid.name == "int8" else 1
        yield from ((grid.stored(torch.maximum(most, -least) * f / outermost), middle) for f in factors)
    elif grid.symmetric:
        base = torch.where(most > -least, -most, -least) / 8  # the largest number, sign and all, on code 0
        yield from ((grid.stored(base * f), middle) for f in factors)
        yield from ((grid.stored(-base * f), middle) for f in factors)
    else:
        for f in factors:  # what is clipped: the largest numbers, the smallest, or both alike
            scale = grid.stored((most - least) * f / 15)
            over = reciprocal(scale)
            for zero in (-least * over, 15 - most * over, -least * f * over):
                yield scale, zero.round().clamp(0, 15)


def pack(levels: torch.Tensor, scales: Scales, grid: Grid) -> Stored:
    """Levels `[m, n]`, as `Grid.levels` gives them, in the file's bytes."""
    if grid.name == "nf4":
        codes = torch.bucketize(levels.contiguous(), _table(levels.dtype, levels.device)[1]).to(torch.uint8)
        return NF4(join_nibbles(codes, high_first=True), scales.scale.float())
    if grid.name == "int8":
        return Int8(levels.to(torch.int8), scales.scale.bfloat16())
    codes = (levels + scales.zero.repeat_interleave(grid.width(levels.shape[1]), 1)).to(torch.uint8)
    zero = None if grid.symmetric else scales.zero.to(torch.uint8)
    return Int4(join_nibbles(codes, high_first=False), scales.scale.bfloat16(), zero)


def decoded(tensor: Stored) -> torch.Tensor:
    """The matrix `[m, n]` fp64 that the bytes stand for."""
    return dequantize(tensor).double()


@cache
def _table(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """nf4's levels, and the numbers halfway between two of them."""
    levels = torch.tensor(LEVELS, dtype=dtype, device=device)
    return levels, (levels[1:] + levels[:-1]) / 2


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 where the scale is 0, for groups of zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)
