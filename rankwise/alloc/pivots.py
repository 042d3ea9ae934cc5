"""Pivot form of a layer: of a product of rank k, k of its own rows and a rule for the others (PIFA, 2501.19090).

Which rows is decided so that the rule's coefficients stay small, since they are rounded to 16 bits. QR with column
pivoting sees to that on the host; LU with partial pivoting and exchanges of rows (maxvol, Goreinov et al. 2010, How to
find a good submatrix) runs on any device, and its rows are as good.
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

LARGEST = 1.05  # size of a coefficient above which its row and its pivot change places
MOST = 20  # exchanges a pivot; each makes the pivots' volume larger by LARGEST
EXACT = 1e-10  # of the matrix: further off, elimination has grown too much for exchanges to mend

Chosen = tuple[torch.Tensor, torch.Tensor]  # rows in their new order `[m]`, and coefficients `[m - k, k]` fp64


def pivot_form(
    u: torch.Tensor, v: torch.Tensor, choose: Callable[[torch.Tensor], Chosen] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewrite `u v` of rank k as k of its own rows and a rule for the others.

    Args:
        u: `[m, k]`, k < m.
        v: `[k, n]`, on the same device.
        choose: `by_qr` or `by_exchange`; by default the former in host memory, the latter elsewhere.

    Returns:
        index `[m]` int32 (see `kernels.pivot_linear`), basis `[k, n]` and coeff `[m - k, k]`, both fp32, where u is.
    """
    rows, rank = u.double(), u.shape[1]
    order, coeff = (choose or (by_qr if u.device.type == "cpu" else by_exchange))(rows)
    index = torch.empty(len(rows), dtype=torch.int32, device=u.device)
    index[order] = torch.arange(len(rows), dtype=torch.int32, device=u.device)
    return index, (rows[order[:rank]] @ v.double()).float(), coeff.float().contiguous()


def by_qr(rows: torch.Tensor) -> Chosen:
    """Rows of `[m, k]` fp64 by QR with column pivoting of the transpose, on the host."""
    rank, matrix = rows.shape[1], rows.cpu().numpy()
    r, order = scipy.linalg.qr(matrix.T, mode="r", pivoting=True)
    if abs(r[rank - 1, rank - 1]) > 1e-12 * abs(r[0, 0]):
        coeff = scipy.linalg.solve_triangular(r[:rank, :rank], r[:rank, rank:]).T
    else:  # fewer than k independent columns: any exact combination will do
        coeff = np.linalg.lstsq(matrix[order[:rank]].T, matrix[order[rank:]].T, rcond=None)[0].T
    found = torch.from_numpy(order.astype(np.int64)), torch.from_numpy(np.ascontiguousarray(coeff))
    return found[0].to(rows.device), found[1].to(rows.device)


def by_exchange(rows: torch.Tensor) -> Chosen:
    """Rows of `[m, k]` fp64 by LU, exchanged while a coefficient is above LARGEST, on the rows' device."""
    rank = rows.shape[1]
    packed, swaps, _ = torch.linalg.lu_factor_ex(rows)  # as far as it goes, where U is singular
    order = torch.tensor(_permuted(len(rows), swaps.tolist()), device=rows.device)
    lower = packed.tril(-1)  # P L U = rows, and `L₂ L₁⁻¹` has no part of U, which may be singular
    coeff = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
    del packed, lower
    for _ in range(MOST * rank):
        size, at = coeff.abs().flatten().max(0)
        if not float(size) > LARGEST:
            break
        _exchange(order, coeff, *divmod(int(at), rank))
    off = torch.linalg.norm(coeff @ rows[order[:rank]] - rows[order[rank:]])
    return (order, coeff) if float(off) <= EXACT * float(torch.linalg.norm(rows)) else by_qr(rows)


def _permuted(count: int, swaps: list[int]) -> list[int]:
    """The order that LAPACK's exchanges leave: row i with row `swaps[i]`, counted from 1, one after another."""
    order = list(range(count))
    for first, second in enumerate(swaps):
        order[first], order[second - 1] = order[second - 1], order[first]
    return order


def _exchange(order: torch.Tensor, coeff: torch.Tensor, row: int, pivot: int) -> None:
    """Let `row` of the others and a pivot change places, in place.

    `x = Σ c_l p_l` is solved for p_j, and put into the other rows: a rank-one update of the coefficients.
    """
    rank, own, column = coeff.shape[1], coeff[row].clone(), coeff[:, pivot].clone()
    size = own[pivot].clone()
    own[pivot] -= 1
    coeff.sub_(torch.outer(column, own / size))
    coeff[row] = -own / size
    coeff[row, pivot] = 1 / size
    order[[pivot, rank + row]] = order[[rank + row, pivot]]
