"""Low-rank linear layer: `y = U (V x) + b`."""

import torch
from torch.nn.functional import linear

from rankwise.kernels.alone import alone
from rankwise.kernels.pack import few_tokens, rows_of


def lowrank_linear(x: torch.Tensor, v: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply `W ≈ U V` without forming W.

    In Triton one to 64 tokens go through the kernels of `packed.py`; more tokens, and whatever wants a gradient,
    through two products of the library.

    Args:
        x: `[..., n]`, floating point.
        v: `[k, n]`, same dtype as `x`.
        u: `[m, k]`.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.
    """
    if not few_tokens(x, v, u, bias):
        return linear(linear(x, v), u, bias)
    return alone(rows_of(x), v, u, None, bias, len(u)).reshape(*x.shape[:-1], len(u))
