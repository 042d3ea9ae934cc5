"""Low-rank linear layer: `y = U (V x) + b`."""

import torch
from torch.nn.functional import linear


def lowrank_linear(x: torch.Tensor, v: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply `W ≈ U V` without forming W.

    Args:
        x: `[..., n]`, floating point.
        v: `[k, n]`, same dtype as `x`.
        u: `[m, k]`.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.
    """
    return linear(linear(x, v), u, bias)
