"""Linear layers that share an input, for a few tokens: one kernel for all first factors, one for all second factors.

At decode a low-rank layer is a few microseconds of reading weights, so what counts is the number of launches and the
bytes in flight. Layers of every kind go together (`pack.py`): a dense layer is a first factor whose result is copied,
a pivot layer one whose result is copied and multiplied on.
"""

from typing import Any

import torch

from rankwise.kernels.backend import capability, cdiv, power_of_two, sm_count
from rankwise.kernels.expand import TILE, expand
from rankwise.kernels.shrink import shrink

MOST_TOKENS = 64  # beyond that the library's products are faster, and `pack.packed_linear` calls them
PDL = False  # until a device has shown that it pays


def sizes_for(tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and compiler's options, by tokens and dtype. One token needs no matrix units, only bytes in flight."""
    if tokens == 1:
        return {"ROWS": 16, "INNER": 512, "TOKENS": 1, "num_warps": 4, "num_stages": 1}
    wide = tokens > 16 or dtype == torch.float32
    shape = {"ROWS": TILE, "INNER": 64 if wide else 128, "TOKENS": max(16, power_of_two(tokens))}
    return shape | {"num_warps": 4, "num_stages": 3 if wide else 4}


def splits_for(tokens: int, inner: int, ranks: int, rows: int, sms: int) -> int:
    """Programs that are to share one reduction: about two for each multiprocessor."""
    wanted = cdiv(2 * sms, cdiv(ranks, rows))
    return max(1, min(wanted, 8 if tokens == 1 else 4, inner // 256))


def starts_early(device: torch.device) -> bool:
    """Whether the second kernel starts before the first one ends: where a device can, if that is to be."""
    return PDL and capability(device) >= 90


def run(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    table: torch.Tensor,
    place: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    outputs: int,
    align: int,
    gated: bool,
    eps: float | None,
    pdl: bool,
) -> torch.Tensor:
    """Start both kernels; see `pack.packed_linear` for what they compute.

    Args:
        x: `[T, n]`, 1 ≤ T ≤ 64, its last dimension contiguous.
        first: `[R, n]`.
        second: see `expand.expand`, as are the arguments after it.
        table: see there.
        place: see there.
        bias: see there.
        residual: `[T, outputs]`, contiguous, or None.
        outputs: columns of the result.
        align: see there.
        gated: see there.
        eps: see there.
        pdl: let the second kernel start before the first one ends (from compute capability 9.0).
    """
    tokens, inner = x.shape
    sizes: dict[str, Any] = sizes_for(tokens, x.dtype) | {"PDL": pdl}
    splits = splits_for(tokens, inner, len(first), sizes["ROWS"], sm_count(x.device))
    y = x.new_empty(tokens, outputs)
    shrunk = shrink(x, first, splits, sizes, squares=eps is not None)
    tensors = second, table, place, bias, residual, y
    early = {"launch_pdl": True} if pdl else {}  # of the second kernel only: the first one waits for whoever makes x
    expand(shrunk, *tensors, sizes | early, inner=inner, align=align, gated=gated, eps=eps)
    return y


@torch.library.custom_op("rankwise::packed", mutates_args=())
def packed(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    table: torch.Tensor,
    place: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    outputs: int,
    align: int,
    gated: bool,
    eps: float | None,
) -> torch.Tensor:
    """`run`, as one node of a graph."""
    return run(x, first, second, table, place, bias, residual, outputs, align, gated, eps, starts_early(x.device))


@packed.register_fake
def _(x: Any, first: Any, second: Any, table: Any, place: Any, bias: Any, residual: Any, outputs: Any, *_: Any) -> Any:
    return x.new_empty(len(x), outputs)
