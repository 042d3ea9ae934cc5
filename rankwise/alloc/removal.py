"""What it costs to take channels out of an MLP, and what the layer that reads them does about it.

The layer that reads the channels, `y = W x`, loses columns P and keeps S. With the metric `½ tr(F E C Eᵀ)` of an error
E of the weight, the best that the columns in S can do for the lost ones is `W_S + W_P C_PS C_SS⁻¹`: what the kept
channels tell of the others by linear regression. One channel at a time that is the optimal brain surgeon (Hassibi and
Stork, 1993) with the Hessian `C ⊗ F`: channel j costs `½ w_jᵀ F w_j / (C⁻¹)_jj`. The layers that write the channels
lose rows, at no cost of their own.
"""

import torch

from rankwise.errors import RankwiseError

AT_ONCE = 64  # channels until the matrices are brought up to date


@torch.no_grad()
def removal_order(
    weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels in the order in which they are taken out, each the cheapest after those before it.

    Args:
        weight: W `[m, n]` of the layer that reads them.
        inputs: C `[n, n]` fp64, positive definite.
        outputs: F `[m, m]` fp64, positive definite.
        most: how many, fewer than n.

    Returns:
        `[most]` channels, and `[most + 1]` fp64 the loss after 0, 1, ... of them, in the units of C and F.

    Raises:
        RankwiseError: a moment is not positive definite.
    """
    try:
        left = (torch.linalg.cholesky(outputs).mT @ weight.double()).T.contiguous()  # a row a channel
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(inputs))
    except torch.linalg.LinAlgError:
        raise RankwiseError("second moments", "not positive definite", "measure the curvature again") from None
    order = torch.empty(most, dtype=torch.int64, device=left.device)
    losses = torch.zeros(most + 1, dtype=torch.float64, device=left.device)
    gone = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    for first in range(0, most, AT_ONCE):
        count = min(AT_ONCE, most - first)
        order[first : first + count], costs = _take(left, inverse, gone, count)
        losses[first + 1 : first + count + 1] = losses[first] + costs.cumsum(0)
    return order, losses


def _take(
    left: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take out so many channels, one after another; the matrices are brought up to date once, at the end.

    A channel p changes them by `-c c_pᵀ / c_p` with its own column c, and that only needs to be known of the columns
    that are asked for: each step reads `left` and writes vectors.

    Args:
        left: `[n, m]`, rows are channels' columns of W in the metric; changed in place.
        inverse: C⁻¹ of the channels that are there, `[n, n]`; changed in place.
        gone: `[n]`, 0, or infinite for channels that were taken; changed in place.
        count: how many.

    Returns:
        `[count]` channels, and what each costs.
    """
    columns = torch.zeros(len(left), count, dtype=left.dtype, device=left.device)  # c / c_p
    removed = torch.zeros(count, left.shape[1], dtype=left.dtype, device=left.device)
    pivots, costs = (torch.zeros(count, dtype=left.dtype, device=left.device) for _ in range(2))
    order = torch.empty(count, dtype=torch.int64, device=left.device)
    size, spread = left.square().sum(1), inverse.diagonal().clone()
    for step in range(count):
        costs[step], at = (size / spread / 2 + gone).min(0)
        order[step], before, lost = at, columns[:, :step], removed[:step]
        column = inverse[:, at] - before @ (before[at] * pivots[:step])
        row = left[at] - before[at] @ lost
        share = column / column[at]
        size += share * (share * row.square().sum() - 2 * (left @ row - before @ (lost @ row)))
        spread -= share * column
        columns[:, step], removed[step], pivots[step] = share, row, column[at]
        gone[at], spread[at] = torch.inf, 1.0
    left.addmm_(columns, removed, alpha=-1)
    inverse.addmm_(columns * pivots, columns.mT, alpha=-1)
    inverse[order, order] = 1.0
    return order, costs


@torch.no_grad()
def without(weight: torch.Tensor, inputs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`W_S + W_P C_PS C_SS⁻¹`, `[m, |S|]` fp64.

    Args:
        weight: W `[m, n]`.
        inputs: C `[n, n]` fp64, positive definite.
        kept: S, rising.
    """
    lost = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    lost[kept] = False
    weight, rows = weight.double(), inputs[kept]
    if not lost.any():
        return weight
    return weight[:, kept] + weight[:, lost] @ torch.linalg.solve(rows[:, kept], rows[:, lost]).T
