"""The first kernel of a packed group: `x Vᵀ` for a few tokens, its long reduction split over several programs.

For one token the partial sums are left in fp32, and the second kernel (`expand.py`) adds them up when it loads them.
For more tokens that would be too much to read again: there the program that comes last adds them up. Both add in the
order of the splits, so results repeat to the bit.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rankwise.kernels.backend import cdiv, launch, power_of_two, tl, triton


@triton.jit
def _shrink(
    x,
    first,
    partial,
    z,
    squares,
    arrived,
    tokens,
    inner,
    ranks,
    chunk,
    stride_x,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    SQUARES: tl.constexpr,
    PDL: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    at = split * chunk + tl.arange(0, INNER)
    weights = first + (row % ranks).to(tl.int64)[:, None] * inner + at[None, :]
    inputs = x + (token % tokens)[None, :] * stride_x + at[:, None]
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    if TOKENS == 1:
        wide = tl.zeros((ROWS, INNER), dtype=tl.float32)
        norm = tl.zeros((INNER,), dtype=tl.float32)
        inputs = x + at
    else:
        norms = tl.zeros((TOKENS,), dtype=tl.float32)
    for start in range(0, chunk, INNER):
        inside = at < inner - start
        if EVEN:
            w = tl.load(weights, eviction_policy="evict_first")
            some = tl.load(inputs, eviction_policy="evict_last")
        else:
            w = tl.load(weights, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            some = tl.load(inputs, mask=inside if TOKENS == 1 else inside[:, None], other=0.0)
        if TOKENS == 1:
            value = some.to(tl.float32)
            wide += w.to(tl.float32) * value[None, :]
            norm += value * value
        else:
            total = tl.dot(w, some, total, input_precision="ieee")
            if SQUARES:
                values = some.to(tl.float32)
                norms += tl.sum(values * values, axis=0)
        weights += INNER
        inputs += INNER
    if TOKENS == 1:
        total = tl.sum(wide, axis=1)[:, None]
    if SQUARES:
        if tl.program_id(0) == 0:
            if TOKENS == 1:
                tl.store(squares + split, tl.sum(norm, axis=0))
            else:
                tl.store(squares + split * tokens + token, norms, mask=token < tokens)
    offset = token[None, :] * ranks + row[:, None]
    inside = (row < ranks)[:, None] & (token < tokens)[None, :]
    size = tokens * ranks
    if TOKENS == 1:
        tl.store(partial + split * size + offset, total, mask=inside)
    elif SPLITS == 1:
        tl.store(z + offset, total.to(z.dtype.element_ty), mask=inside)
    else:
        tl.store(partial + split * size + offset, total, mask=inside)
        tl.debug_barrier()  # all of this program's sums are out before it says so
        ticket = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")
        if ticket == SPLITS - 1:
            total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for number in tl.static_range(SPLITS):
                total += tl.load(partial + number * size + offset, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(z + offset, total.to(z.dtype.element_ty), mask=inside)
            tl.store(arrived + tl.program_id(0), 0)  # ready for the next call


@dataclass(frozen=True)
class Shrunk:
    """What the second kernel reads.

    Args:
        partial: fp32 `[splits, T, R]`, or None where z is all.
        z: `[T, R]` in the dtype of x; None for one token.
        squares: fp32 `[splits, T]`, partial sums of `x²`, or None.
        splits: programs that shared one reduction.
        ranks: R.
    """

    partial: torch.Tensor | None
    z: torch.Tensor | None
    squares: torch.Tensor | None
    splits: int
    ranks: int


@cache  # captured graphs hold their addresses
def counters(device: torch.device, stream: int, count: int) -> torch.Tensor:
    """Zeros that every call leaves zero: how many programs of a tile have arrived. One set for a stream."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def shares(inner: int, splits: int, step: int) -> tuple[int, int]:
    """How many programs share a reduction, and how much of it each has: whole steps, so none is left without any.

    Args:
        inner: n.
        splits: programs that would be welcome.
        step: of a program's loop.
    """
    chunk = max(1, cdiv(cdiv(inner, splits), step)) * step
    return max(1, cdiv(inner, chunk)), chunk


def shrink(x: torch.Tensor, first: torch.Tensor, splits: int, sizes: dict[str, Any], *, squares: bool) -> Shrunk:
    """Start the kernel.

    Args:
        x: `[T, n]`, its last dimension contiguous.
        first: `[R, n]`, contiguous.
        splits: programs that would be welcome to share one reduction, see `shares`.
        sizes: of tiles, and the compiler's options, see `packed.sizes_for`.
        squares: sum `x²` too.
    """
    (tokens, inner), ranks, device = x.shape, len(first), x.device
    rows, step = sizes["ROWS"], sizes["INNER"]
    splits, chunk = shares(inner, splits, step)
    summed = tokens == 1 or splits > 1
    partial = x.new_empty(splits, tokens, ranks, dtype=torch.float32) if summed else None
    z = x.new_empty(tokens, ranks) if tokens > 1 else None
    norms = x.new_empty(splits, tokens, dtype=torch.float32) if squares else None
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    arrived = counters(device, stream, power_of_two(cdiv(ranks, rows))) if z is not None and summed else None
    launch(
        _shrink,
        (cdiv(ranks, rows), splits),
        *(x, first, partial, z, norms, arrived, tokens, inner, ranks, chunk, x.stride(0)),
        EVEN=chunk * splits == inner,
        SQUARES=squares,
        SPLITS=splits,
        **sizes,
    )
    return Shrunk(partial, z, norms, splits, ranks)
