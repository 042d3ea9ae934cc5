"""Linear layers that share an input, for a few tokens: one kernel for all first factors, one for all second factors.

At decode a low-rank layer is a few microseconds of reading weights, so what counts is the number of launches and the
bytes in flight. The first kernel (shrink) splits its long reduction over several programs. For one token it leaves
their partial sums in fp32, and the second kernel (expand) adds them up when it loads them. For more tokens that would
be too much to read again: there the program that comes last adds them up. Both add in the order of the splits, so
results repeat to the bit. Layers of every kind go together (`pack.py`): a dense layer is a first factor whose result
is copied, a pivot layer one whose result is copied and multiplied on.
"""

from functools import lru_cache
from typing import Any

import torch

from rankwise.kernels.backend import capability, cdiv, launch, power_of_two, sm_count, tl, triton

MOST_TOKENS = 64  # beyond that the library's products are faster, and `pack.packed_linear` calls them
TILE = 32  # outputs of one entry of the table
FIELDS = 5  # of an entry, see `pack.table_of`
PDL = False  # until a device has shown that it pays


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


@triton.jit
def _sums(partial, ranks, at, inside, SPLITS: tl.constexpr):
    """One token's components: partial sums, in the order of their splits."""
    total = tl.load(partial + at, mask=inside, other=0.0, eviction_policy="evict_last")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial + split * ranks + at, mask=inside, other=0.0, eviction_policy="evict_last")
    return total


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
):
    """`[ROWS, TOKENS]` outputs, of the rows `row` of one entry of the table."""
    token = tl.arange(0, TOKENS)
    offset = tl.load(entry).to(tl.int64) * ALIGN
    rank = tl.load(entry + 1) * ALIGN
    component = tl.load(entry + 2)
    count = tl.load(entry + 3)
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    if rank == 0:  # copied
        if TOKENS == 1:
            total = _sums(partial, ranks, component + row, row < count, SPLITS)[:, None]
        else:
            inside = (row < count)[:, None] & (token < tokens)[None, :]
            total = tl.load(z + token[None, :] * ranks + component + row[:, None], mask=inside, other=0.0).to(
                tl.float32
            )
    else:
        at = tl.arange(0, INNER)
        weights = second + offset + (row % count)[:, None] * rank + at[None, :]
        if TOKENS == 1:
            wide = tl.zeros((ROWS, INNER), dtype=tl.float32)
            for start in range(0, rank, INNER):
                inside = at < rank - start
                w = tl.load(weights, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                wide += w.to(tl.float32) * _sums(partial, ranks, component + start + at, inside, SPLITS)[None, :]
                weights += INNER
            total = tl.sum(wide, axis=1)[:, None]
        else:
            inputs = z + (token % tokens)[None, :] * ranks + component + at[:, None]
            for start in range(0, rank, INNER):
                inside = at < rank - start
                w = tl.load(weights, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                some = tl.load(inputs, mask=inside[:, None], other=0.0)
                total = tl.dot(w, some, total, input_precision="ieee")
                weights += INNER
                inputs += INNER
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
    if PDL:  # the table is there already, what the first kernel writes is not
        tl.extra.cuda.gdc_wait()
    value = _outputs(entry, row, second, partial, z, tokens, ranks, SPLITS, ALIGN, ROWS, INNER, TOKENS)
    if GATED:
        entry += half * FIELDS
        up = _outputs(entry, row, second, partial, z, tokens, ranks, SPLITS, ALIGN, ROWS, INNER, TOKENS)
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


def sizes_for(tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and compiler's options, by tokens and dtype. One token needs no matrix units, only bytes in flight."""
    if tokens == 1:
        return {"ROWS": 16, "INNER": 512, "TOKENS": 1, "num_warps": 4, "num_stages": 1}
    wide = tokens > 16 or dtype == torch.float32
    shape = {"ROWS": TILE, "INNER": 64 if wide else 128, "TOKENS": max(16, power_of_two(tokens))}
    return shape | {"num_warps": 4, "num_stages": 3 if wide else 4}


def splits_for(tokens: int, inner: int, ranks: int, rows: int, sms: int) -> int:
    """Programs that share one reduction: about two for each multiprocessor."""
    wanted = cdiv(2 * sms, cdiv(ranks, rows))
    return max(1, min(wanted, 8 if tokens == 1 else 4, inner // 256))


@lru_cache(maxsize=64)
def counters(device: torch.device, stream: int, count: int) -> torch.Tensor:
    """Zeros that every call leaves zero: how many programs of a tile have arrived. One set for a stream."""
    return torch.zeros(count, dtype=torch.int32, device=device)


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
        second: all second factors, one after another, flat.
        table: int32 `[tiles, FIELDS]`.
        place: int32 `[Σ m]`, where each row of the tiles goes, or None.
        bias: `[Σ m]` in the order of the outputs, or None.
        residual: `[T, outputs]`, contiguous, or None.
        outputs: columns of the result.
        align: numbers in the table's first two fields count so many elements.
        gated: the tiles of the table's first half are gates of those of the second.
        eps: of RMSNorm, or None.
        pdl: let the second kernel start before the first one ends (from compute capability 9.0).
    """
    (tokens, inner), ranks, device = x.shape, len(first), x.device
    sizes: dict[str, Any] = sizes_for(tokens, x.dtype)
    rows, step = sizes["ROWS"], sizes["INNER"]
    splits = splits_for(tokens, inner, ranks, rows, sm_count(device))
    chunk = cdiv(cdiv(inner, splits), step) * step
    summed = tokens == 1 or splits > 1
    partial = x.new_empty(splits, tokens, ranks, dtype=torch.float32) if summed else None
    z = x.new_empty(tokens, ranks) if tokens > 1 else None
    squares = x.new_empty(splits, tokens, dtype=torch.float32) if eps is not None else None
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    arrived = counters(device, stream, power_of_two(cdiv(ranks, rows))) if z is not None and summed else None
    y = x.new_empty(tokens, outputs)
    sizes |= {"SPLITS": splits, "PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    launch(
        _shrink,
        (cdiv(ranks, rows), splits),
        *(x, first, partial, z, squares, arrived, tokens, inner, ranks, chunk, x.stride(0)),
        EVEN=chunk * splits == inner,
        SQUARES=eps is not None,
        **sizes,
    )
    entries, parts = len(table) // 2 if gated else len(table), TILE // rows
    launch(
        _expand,
        (entries * parts,),
        *(partial, z, squares, second, table, place, bias, residual, y, tokens, ranks, outputs, inner),
        *(eps or 0.0, entries),
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
    pdl = PDL and capability(x.device) >= 90
    return run(x, first, second, table, place, bias, residual, outputs, align, gated, eps, pdl)


@packed.register_fake
def _(x: Any, first: Any, second: Any, table: Any, place: Any, bias: Any, residual: Any, outputs: Any, *_: Any) -> Any:
    return x.new_empty(len(x), outputs)
