"""What rounding to 4 or 8 bits will cost, before it is done: for choosing precisions of all layers together.

Error feedback (`feedback.py`) leaves a matrix the loss `½ Σ_ij E_i D_j e_ij²`, where D and E are the squared diagonals
of its moments' triangles and e_ij is what rounding one number leaves. That is taken as uniform over a step of the grid,
so `e_ij² = step_ij² / 12`, with the step that the largest number of the group asks for. Clipping, nf4's uneven levels
and what the second factor makes up for are left to a factor of each kind and precision, measured on some layers.
"""

from collections.abc import Sequence

import torch

from rankwise.alloc.feedback import Triangle, triangle
from rankwise.alloc.pivots import pivot_form
from rankwise.alloc.rounding import turned
from rankwise.alloc.scales import Grid
from rankwise.kernels.int8 import MOST


def expected_dense(
    weight: torch.Tensor, grids: Sequence[Grid], inputs: Triangle, outputs: Triangle | None
) -> list[float]:
    """Loss of rounding a weight in each of the formats, nats a token with F.

    Args:
        weight: `[m, n]` fp64.
        grids: each `group` divides n.
        inputs: of C `[n, n]`.
        outputs: of F `[m, m]`, or None for the identity.
    """
    return [_matrix(weight, grid, inputs, outputs) for grid in grids]


def expected_lowrank(
    u: torch.Tensor,
    v: torch.Tensor,
    grids: Sequence[Grid],
    inputs: tuple[torch.Tensor, Triangle],
    outputs: tuple[torch.Tensor, Triangle] | None,
) -> list[float]:
    """Loss that rounding adds to factors `u [m, k]`, `v [k, n]` fp64, in each of the formats that k allows.

    Args:
        u, v: of one rank.
        grids: formats; for one whose `group` does not divide k it is inf.
        inputs: C and its triangle.
        outputs: F and its triangle, or None.
    """
    u, v = turned(u, v)
    across = triangle(u.T @ (u if outputs is None else outputs[0] @ u))
    down = triangle(v @ inputs[0] @ v.T)
    rows = None if outputs is None else outputs[1]
    return _factored(grids, (v, inputs[1], across), (u, down, rows))


def expected_pivot(
    u: torch.Tensor,
    v: torch.Tensor,
    grids: Sequence[Grid],
    inputs: tuple[torch.Tensor, Triangle],
    outputs: tuple[torch.Tensor, Triangle] | None,
) -> list[float]:
    """The same for the pivot form of these factors; arguments are those of `expected_lowrank`."""
    index, basis, coeff = pivot_form(u, v)
    order, rank = torch.argsort(index.long(), stable=True), len(basis)
    basis, coeff = basis.double(), coeff.double()
    rows = torch.cat([torch.eye(rank).to(coeff), coeff])
    f = None if outputs is None else outputs[0][order][:, order]
    across = triangle(rows.T @ (rows if f is None else f @ rows))
    down = triangle(basis @ inputs[0] @ basis.T)
    others = None if f is None else triangle(f[rank:, rank:])
    return _factored(grids, (basis, inputs[1], across), (coeff, down, others))


def fits(matrix: torch.Tensor, grid: Grid) -> bool:
    """Whether whole groups make up a matrix's columns."""
    return matrix.shape[1] % grid.width(matrix.shape[1]) == 0


Measured = tuple[torch.Tensor, Triangle, Triangle | None]  # a matrix, and what errors of its columns and rows cost


def _factored(grids: Sequence[Grid], first: Measured, second: Measured) -> list[float]:
    """Loss of two factors in each of the formats; inf where groups do not divide the rank."""

    def loss(grid: Grid) -> float:
        return sum(_matrix(matrix, grid, columns, rows) for matrix, columns, rows in (first, second))

    return [loss(grid) if fits(second[0], grid) else float("inf") for grid in grids]


def _matrix(matrix: torch.Tensor, grid: Grid, columns: Triangle, rows: Triangle | None) -> float:
    """`½ Σ_ij E_i D_j step_ij² / 12` of one matrix `[m, n]`."""
    width = grid.width(matrix.shape[1])
    groups = matrix.unflatten(1, (-1, width))
    if grid.symmetric:  # int4's largest number lies on code 0, eight steps from the middle; nf4's is as good as that
        step = groups.abs().amax(2) / (MOST if grid.name == "int8" else 8)
    else:
        step = (groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)) / 15
    cost = columns.weights.unflatten(0, (-1, width)).sum(1)
    each = step.square() @ cost
    return float(each.sum() if rows is None else each @ rows.weights) / 24
