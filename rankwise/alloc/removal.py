"""What it costs to take channels out of an MLP, and what the layer that reads them does about it.

The layer that reads the channels, `y = W x`, loses columns P and keeps S. With the metric `½ tr(F E C Eᵀ)` of an error
E of the weight, the best that the columns in S can do for the lost ones is `W_S + W_P C_PS C_SS⁻¹`: what the kept
channels tell of the others by linear regression. One channel at a time that is the optimal brain surgeon (Hassibi and
Stork, 1993) with the Hessian `C ⊗ F`: channel j costs `½ w_jᵀ F w_j / (C⁻¹)_jj`. The layers that write the channels
lose rows, at no cost of their own.
"""

import torch

from rankwise.errors import RankwiseError


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
    gone = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    order = torch.empty(most, dtype=torch.int64, device=left.device)
    losses = torch.zeros(most + 1, dtype=torch.float64, device=left.device)
    for step in range(most):
        costs = left.square().sum(1) / inverse.diagonal() / 2 + gone
        cost, at = costs.min(0)
        order[step], losses[step + 1] = at, losses[step] + cost
        row, column, removed = inverse[at] / inverse[at, at], inverse[:, at].clone(), left[at].clone()
        left.addr_(row, removed, alpha=-1)
        inverse.addr_(column, row, alpha=-1)
        gone[at] = torch.inf
        inverse[at, at] = 1.0
    return order, losses


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
