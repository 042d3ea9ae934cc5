"""The second kernel of a packed group: every member's second factor, with norm, bias, SwiGLU and residual at the end.

One program makes the outputs of one entry of a table (`pack.table_of`): a piece of one member's product, or a copy of
what the first kernel (`shrink.py`) made.
"""

from typing import Any

import torch

from rankwise.kernels.backend import launch, tl, triton
from rankwise.kernels.shrink import Shrunk

TILE = 32  # outputs of one entry of the table
FIELDS = 5  # of an entry


@triton.jit
def _sums(partial, ranks, at, inside, SPLITS: tl.constexpr):
    """One token's components: partial sums, in the order of their splits."""
    total = tl.load(partial + at, mask=inside, other=0.0, eviction_policy="evict_last")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial + split * ranks + at, mask=inside, other=0.0, eviction_policy="evict_last")
    return total


@triton.jit
def _step(
    weights,
    inputs,
    total,
    left,
    ranks,
    SPLITS: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One round of a reduction with `left` columns to come; WAIT for the components once weights are asked for."""
    at = tl.arange(0, INNER)
    w = tl.load(weights, mask=(at < left)[None, :], other=0.0, eviction_policy="evict_first")
    if WAIT:
        tl.extra.cuda.gdc_wait()
    if TOKENS == 1:
        return total + w.to(tl.float32) * _sums(inputs, ranks, at, at < left, SPLITS)[None, :]
    else:
        some = tl.load(inputs, mask=(at < left)[:, None], other=0.0)
        return tl.dot(w, some, total, input_precision="ieee")


@triton.jit
def _product(
    weights,
    partial,
    z,
    component,
    rank,
    tokens,
    ranks,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`[ROWS, TOKENS]` products of components with rows of a second factor, to whose first columns `weights` points."""
    FIRST: tl.constexpr = INNER if PDL else 0
    if TOKENS == 1:
        inputs = partial + component
    else:
        inputs = z + component + (tl.arange(0, TOKENS) % tokens)[None, :] * ranks + tl.arange(0, INNER)[:, None]
    total = tl.zeros((ROWS, INNER if TOKENS == 1 else TOKENS), dtype=tl.float32)
    if PDL:
        total = _step(weights, inputs, total, rank, ranks, SPLITS, INNER, TOKENS, True)
    weights += FIRST
    inputs += FIRST
    for start in tl.range(FIRST, rank, INNER, num_stages=STAGES):
        total = _step(weights, inputs, total, rank - start, ranks, SPLITS, INNER, TOKENS, False)
        weights += INNER
        inputs += INNER
    return tl.sum(total, axis=1)[:, None] if TOKENS == 1 else total


@triton.jit
def _outputs(
    entry,
    row,
    second,
    partial,
    z,
    tokens,
    ranks,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """`[ROWS, TOKENS]` outputs, of the rows `row` of one entry of the table."""
    token = tl.arange(0, TOKENS)
    offset = tl.load(entry).to(tl.int64) * ALIGN
    rank = tl.load(entry + 1) * ALIGN
    component = tl.load(entry + 2)
    count = tl.load(entry + 3)
    weights = second + offset + (row % count)[:, None] * rank + tl.arange(0, INNER)[None, :]
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    if rank == 0:  # copied
        if PDL:
            tl.extra.cuda.gdc_wait()
        if TOKENS == 1:
            total = _sums(partial, ranks, component + row, row < count, SPLITS)[:, None]
        else:
            inside = (row < count)[:, None] & (token < tokens)[None, :]
            total = tl.load(z + token[None, :] * ranks + component + row[:, None], mask=inside, other=0.0).to(
                tl.float32
            )
    elif (component | ranks) % ALIGN == 0:
        at, step = component // ALIGN * ALIGN, ranks // ALIGN * ALIGN  # said so that their loads are wide
        total = _product(weights, partial, z, at, rank, tokens, step, SPLITS, ROWS, INNER, TOKENS, PDL, None)
    else:  # behind a dense member of any size
        total = _product(weights, partial, z, component, rank, tokens, ranks, SPLITS, ROWS, INNER, TOKENS, PDL, 1)
    return total


@triton.jit
def _expand(
    partial,
    z,
    squares,
    second,
    table,
    place,
    bias,
    residual,
    y,
    tokens,
    ranks,
    outputs,
    inner,
    eps,
    half,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_PLACE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
    ALIGN: tl.constexpr,
    FIELDS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.arange(0, TOKENS)
    row = (tl.program_id(0) % PARTS) * ROWS + tl.arange(0, ROWS)
    entry = table + (tl.program_id(0) // PARTS) * FIELDS
    count = tl.load(entry + 3)
    out = tl.load(entry + 4) + row
    # With PDL the table and the weights are there already, what the first kernel writes only after a wait.
    value = _outputs(entry, row, second, partial, z, tokens, ranks, SPLITS, ALIGN, ROWS, INNER, TOKENS, PDL)
    if GATED:
        entry += half * FIELDS
        up = _outputs(entry, row, second, partial, z, tokens, ranks, SPLITS, ALIGN, ROWS, INNER, TOKENS, False)
    if HAS_NORM:
        square = tl.zeros((TOKENS,), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            square += tl.load(squares + split * tokens + token, mask=token < tokens, other=0.0)
        scale = tl.rsqrt(square / inner + eps)
        value = value * scale[None, :]
        if GATED:
            up = up * scale[None, :]
    if HAS_PLACE:
        out = tl.load(place + out, mask=row < count, other=0)
    if HAS_BIAS:
        value += tl.load(bias + out, mask=row < count, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias + outputs + out, mask=row < count, other=0.0).to(tl.float32)[:, None]
        value = value * tl.sigmoid(value) * up
    inside = (row < count)[:, None] & (token < tokens)[None, :]
    to = token[None, :].to(tl.int64) * outputs + out[:, None]
    if HAS_RESIDUAL:
        value += tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + to, value.to(y.dtype.element_ty), mask=inside)


def expand(
    shrunk: Shrunk,
    second: torch.Tensor,
    table: torch.Tensor,
    place: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    sizes: dict[str, Any],
    *,
    inner: int,
    align: int,
    gated: bool,
    eps: float | None,
) -> None:
    """Start the kernel.

    Args:
        shrunk: of the first kernel.
        second: all second factors, one after another, flat.
        table: int32 `[tiles, FIELDS]`.
        place: int32 `[Σ m]`, where each row of the tiles goes, or None.
        bias: `[Σ m]` in the order of the outputs, or None.
        residual: like `y`, or None.
        y: `[T, outputs]`, written.
        sizes: as in the first kernel.
        inner: n, for the norm.
        align: numbers in the table's first two fields count so many elements.
        gated: the tiles of the table's first half are gates of those of the second.
        eps: of RMSNorm, or None.
    """
    entries, parts = len(table) // 2 if gated else len(table), TILE // sizes["ROWS"]
    launch(
        _expand,
        (entries * parts,),
        *(shrunk.partial, shrunk.z, shrunk.squares, second, table, place, bias, residual, y),
        *(y.shape[0], shrunk.ranks, y.shape[1], inner, eps or 0.0, entries),
        SPLITS=shrunk.splits,
        GATED=gated,
        HAS_NORM=eps is not None,
        HAS_PLACE=place is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ALIGN=align,
        FIELDS=FIELDS,
        PARTS=parts,
        **sizes,
    )
