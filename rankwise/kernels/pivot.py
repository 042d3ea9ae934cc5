"""Pivot linear layer (PIFA, arXiv 2501.19090): k outputs computed, the others combined from them."""

import torch
from torch.nn.functional import linear

from rankwise.kernels.alone import alone
from rankwise.kernels.pack import few_tokens, rows_of


def pivot_linear(
    x: torch.Tensor,
    index: torch.Tensor,
    basis: torch.Tensor,
    coeff: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply `W ≈ Pᵀ [I; C] B` without forming W.

    In Triton one to 64 tokens go through the kernels of `packed.py`, which put each output where it belongs as they
    store it. A model that runs for long should `pack` its layers once instead: here the permutation is inverted anew.

    Args:
        x: `[..., n]`, floating point.
        index: `[m]` int32, a permutation: output row i is entry `index[i]` of `[B x; C (B x)]`.
        basis: `[k, n]`, the rows of W that were kept.
        coeff: `[m - k, k]`, every other row as a combination of those.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.
    """
    if few_tokens(x, basis, coeff, bias):
        place = torch.argsort(index.long()).to(torch.int32)
        return alone(rows_of(x), basis, coeff, place, bias, len(index)).reshape(*x.shape[:-1], len(index))
    pivots = linear(x, basis)
    y = torch.cat([pivots, linear(pivots, coeff)], dim=-1).index_select(-1, index)
    return y if bias is None else y + bias
