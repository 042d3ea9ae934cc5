"""One layer through the packed kernels, as one node of a graph; `pack.py` is for groups that run for long."""

from typing import Any

import torch

from rankwise.kernels.pack import alignment, table_of
from rankwise.kernels.packed import run, starts_early


@torch.library.custom_op("rankwise::alone", mutates_args=())
def alone(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    place: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
) -> torch.Tensor:
    """`[T, outputs]`: what the first factor computes is copied as far as the second has no rows for it.

    Args:
        x: `[T, n]`, 1 ≤ T ≤ 64, its last dimension contiguous.
        first: `[k, n]`.
        second: `[rows, k]`, rows ≤ outputs.
        place: int32 `[outputs]`, where the copies and then the products go, or None.
        bias: `[outputs]` or None.
        outputs: m.
    """
    shapes = ((outputs, len(first), len(second)),)
    factors = first.contiguous(), second.reshape(-1), table_of(shapes, x.device), place
    row = None if bias is None else bias.contiguous()
    return run(x, *factors, row, None, outputs, alignment(shapes), False, None, starts_early(x.device))


@alone.register_fake
def _(x: Any, first: Any, second: Any, place: Any, bias: Any, outputs: Any) -> Any:
    return x.new_empty(len(x), outputs)
