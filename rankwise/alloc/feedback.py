"""Rounding with error feedback: columns are rounded in order, and each makes up for the errors of those before it.

Write the second moment of the inputs as `H = Mᵀ D M`, M unit lower triangular, D diagonal. The error of a row is then
`Δ H Δᵀ = Σ_j D_j e_j²` with `e = Δ Mᵀ`, that is `e_j = Δ_j + Σ_{i<j} M_ji Δ_i`. To round column j so that |e_j| is
least is the greedy step of GPTQ (2210.17323), which writes it with the inverse of H; it is Babai's nearest plane
(2507.18553).

With a second moment of the output gradients, `F = Nᵀ E N` likewise, the error of the whole matrix is
`Σ_ij E_i D_j e_ij²` with `e = N Δ Mᵀ`: rows make up for the errors of earlier rows too. The entries of an antidiagonal
do not depend on one another, so they are rounded together.
"""

from typing import NamedTuple

import torch

from rankwise.alloc.factors import REMEASURE
from rankwise.alloc.scales import Grid, Scales, reciprocal
from rankwise.errors import RankwiseError

DAMPING = 1e-2  # share of the mean of the diagonal that is added to it, as GPTQ does
TILE = 64  # rows and columns that are rounded between two matrix products


class Triangle(NamedTuple):
    """A damped moment as `Mᵀ D M`, its rows and columns in the order in which they are rounded.

    Args:
        order: `[n]` int64, by falling diagonal: what costs most is rounded while the most is left to make up for it.
        unit: M `[n, n]` fp64, in that order.
        weights: D `[n]`, in the order of the matrix: what an error costs once later ones have made up for it.
    """

    order: torch.Tensor
    unit: torch.Tensor
    weights: torch.Tensor


def triangle(moment: torch.Tensor) -> Triangle:
    """Damp and factor a moment `[n, n]` fp64; all zeros count as the identity.

    Raises:
        RankwiseError: truly indefinite.
    """
    mean = moment.diagonal().mean()
    extra = torch.where(moment.any(), DAMPING * mean, 1.0)
    full = (moment + moment.T) / 2 + extra * torch.eye(len(moment)).to(moment)
    order = full.diagonal().argsort(descending=True, stable=True)
    upper, failed = torch.linalg.cholesky_ex(full[order][:, order].flip(0, 1))  # from the last column on
    if failed:
        raise RankwiseError("second moments", f"indefinite (mean of the diagonal {float(mean):.1e})", REMEASURE)
    upper = upper.flip(0, 1)
    weights = torch.empty_like(order, dtype=moment.dtype).index_copy_(0, order, upper.diagonal().square())
    return Triangle(order, (upper / upper.diagonal()).T.contiguous(), weights)


def round_columns(w: torch.Tensor, inputs: Triangle, scales: Scales, grid: Grid) -> torch.Tensor:
    """Levels `[m, n]`, rounded column by column, all rows at once.

    Args:
        w: `[m, n]` fp64.
        inputs: of the second moment `[n, n]` of what the columns are multiplied by.
        scales: of all groups, fixed before: so columns may be taken in any order.
        grid: the format.
    """
    order, m = inputs.order, inputs.unit
    w, scale, zero = (t[:, order] for t in (w, *_spread(scales, grid, w.shape[1])))
    levels, error, inverse = torch.zeros_like(w), torch.zeros_like(w), reciprocal(scale)
    for left in range(0, w.shape[1], TILE):
        c = slice(left, min(left + TILE, w.shape[1]))
        target = w[:, c] + error[:, :left] @ m[c, :left].T
        for j in range(c.start, c.stop):
            levels[:, j] = grid.levels(target[:, j - left] * inverse[:, j], zero[:, j])
            error[:, j] = w[:, j] - levels[:, j] * scale[:, j]
            target[:, j + 1 - left :] += error[:, j : j + 1] * m[j + 1 : c.stop, j]
    return torch.empty_like(levels).index_copy_(1, order, levels)


def round_both(w: torch.Tensor, inputs: Triangle, outputs: Triangle, scales: Scales, grid: Grid) -> torch.Tensor:
    """Levels `[m, n]`, rounded so that rows make up for one another too.

    Arguments are those of `round_columns`; outputs is of a moment `[m, m]`. Tiles of one antidiagonal do not depend on
    one another either, and are rounded side by side.
    """
    n, m = outputs.unit, inputs.unit
    rows, columns = (-(-size // TILE) for size in w.shape)
    w, scale, zero = (
        _padded(t[outputs.order][:, inputs.order], rows, columns) for t in (w, *_spread(scales, grid, w.shape[1]))
    )
    n, m = _padded(n, rows, rows, unit=True), _padded(m, columns, columns, unit=True)
    levels, error, mixed = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)  # mixed: N Δ
    for wave in range(rows + columns - 1):
        places = [
            (slice(i * TILE, (i + 1) * TILE), slice((wave - i) * TILE, (wave - i + 1) * TILE))
            for i in range(max(0, wave - columns + 1), min(rows, wave + 1))
        ]
        above = torch.stack([n[r, : r.start] @ error[: r.start, c] for r, c in places])
        before = torch.stack([mixed[r, : c.start] @ m[c, : c.start].T for r, c in places])
        own, by, off = (torch.stack([t[r, c] for r, c in places]) for t in (w, scale, zero))
        down, across = torch.stack([n[r, r] for r, _ in places]), torch.stack([m[c, c] for _, c in places])
        for (r, c), level, mix in zip(places, *_tiles(own, by, off, above, before, down, across, grid), strict=True):
            levels[r, c], mixed[r, c] = level, mix
            error[r, c] = w[r, c] - level * scale[r, c]
    back = torch.empty(len(outputs.order), len(inputs.order)).to(levels)
    back[outputs.order[:, None], inputs.order] = levels[: len(back), : back.shape[1]]
    return back


def _tiles(
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    above: torch.Tensor,
    before: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    grid: Grid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and `N Δ` of tiles `[b, p, p]`, whose feedback from the rows above and the columns before is known.

    Columns lie here from last to first, so that an antidiagonal of a tile is a diagonal, and the rows of either
    factor that it needs are a slice.
    """
    p, m = w.shape[1], m.transpose(1, 2).flip(1, 2).contiguous()
    w, scale, zero, across = (t.flip(2).contiguous() for t in (w, scale, zero, before))
    inverse, down, n = reciprocal(scale), above.transpose(1, 2).flip(1).contiguous(), n.transpose(1, 2).contiguous()
    levels, mixed = torch.zeros_like(w), torch.zeros_like(w)
    for d in range(p - 1, -p, -1):
        i = slice(max(0, -d), min(p, p - d))
        j = slice(i.start + d, i.stop + d)
        own = w.diagonal(d, 1, 2)
        wanted = own + down.diagonal(-d, 1, 2)
        level = grid.levels((wanted + across.diagonal(d, 1, 2)) * inverse.diagonal(d, 1, 2), zero.diagonal(d, 1, 2))
        number = level * scale.diagonal(d, 1, 2)
        levels.diagonal(d, 1, 2).copy_(level)
        mixed.diagonal(d, 1, 2).copy_(wanted - number)
        across[:, i].addcmul_((wanted - number)[:, :, None], m[:, j])
        down[:, j].addcmul_((own - number)[:, :, None], n[:, i])
    return levels.flip(2), mixed.flip(2)


def _padded(matrix: torch.Tensor, rows: int, columns: int, *, unit: bool = False) -> torch.Tensor:
    """A matrix filled up to whole tiles: with zeros, which round to zero, or to a longer unit triangle."""
    full = matrix.new_zeros(rows * TILE, columns * TILE)
    full[: len(matrix), : matrix.shape[1]] = matrix
    if unit:
        full.diagonal()[len(matrix) :] = 1
    return full


def _spread(scales: Scales, grid: Grid, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each number, `[m, n]`."""
    each = grid.width(n)
    return scales.scale.repeat_interleave(each, 1), scales.zero.repeat_interleave(each, 1)
