"""Pivot linear layer (PIFA, arXiv 2501.19090): k outputs computed, the others combined from them."""

import torch
from torch.nn.functional import linear


def pivot_linear(
    x: torch.Tensor,
    index: torch.Tensor,
    basis: torch.Tensor,
    coeff: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply `W ≈ Pᵀ [I; C] B` without forming W.

    Args:
        x: `[..., n]`, floating point.
        index: `[m]` int32, a permutation: output row i is entry `index[i]` of `[B x; C (B x)]`.
        basis: `[k, n]`, the rows of W that were kept.
        coeff: `[m - k, k]`, every other row as a combination of those.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.
    """
    pivots = linear(x, basis)
    y = torch.cat([pivots, linear(pivots, coeff)], dim=-1).index_select(-1, index)
    return y if bias is None else y + bias
