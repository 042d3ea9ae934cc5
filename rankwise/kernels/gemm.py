"""A matrix product with what a mask over ranks needs in its epilogue, and with a rank that only the device knows.

One kernel serves the four products of a masked layer (`masked.py`). Its reduction over tokens runs in a fixed order
without atomics, so results repeat to the bit.
"""

from dataclasses import dataclass

import torch

from rankwise.kernels.backend import capability, cdiv, launch, tl, triton
from rankwise.kernels.precision import tf32_allowed

CHUNK = 128  # rows that are summed at once
WIDE = (90, 100, 103)  # compute capabilities whose matrix units leave registers free: tiles may be twice as wide


@triton.jit
def _product(
    a,
    b,
    c,
    c_masked,
    mask,
    other,
    sums,
    bias,
    rank,
    rows,
    columns,
    inner,
    stride_a,
    stride_b_inner,
    stride_b_column,
    stride_c,
    HAS_MASK: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_PLAIN: tl.constexpr,
    LIMIT_COLUMNS: tl.constexpr,
    LIMIT_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    # programs that run at the same time work on GROUP tiles of rows, so that their operands stay in the L2 cache
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + (program % (GROUP * column_tiles)) % size
    column_tile = (program % (GROUP * column_tiles)) // size

    if LIMIT_COLUMNS or LIMIT_INNER:
        kept = tl.load(rank)
    if LIMIT_COLUMNS:
        if column_tile * BLOCK_COLUMNS >= kept:
            return
    end = inner
    if LIMIT_INNER:  # whole blocks: operands are 0 from the rank to the end of the block
        end = tl.minimum(inner, tl.cdiv(kept, BLOCK_INNER) * BLOCK_INNER)

    # 64-bit offsets for the tile, 32-bit ones within it: pointers take a third of the registers
    first_row = row_tile.to(tl.int64) * BLOCK_ROWS
    first_column = column_tile.to(tl.int64) * BLOCK_COLUMNS
    left_rows = rows - row_tile * BLOCK_ROWS
    left_columns = columns - column_tile * BLOCK_COLUMNS
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    at = tl.arange(0, BLOCK_INNER)
    from_a = a + first_row * stride_a
    from_b = b + first_column * stride_b_column
    offset_a = (row % left_rows)[:, None] * stride_a + at[None, :]  # past the end: some row of the tile, never stored
    offset_b = at[:, None] * stride_b_inner + (column % left_columns)[None, :] * stride_b_column
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(0, end, BLOCK_INNER):
        if EVEN_INNER:
            left = tl.load(from_a + offset_a)
            right = tl.load(from_b + offset_b)
        else:
            left = tl.load(from_a + offset_a, mask=at[None, :] < inner - start, other=0.0)
            right = tl.load(from_b + offset_b, mask=at[:, None] < inner - start, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        from_a += BLOCK_INNER
        from_b += BLOCK_INNER * stride_b_inner

    inside = (row < left_rows)[:, None] & (column < left_columns)[None, :]
    corner = first_row * stride_c + first_column
    offset = row[:, None] * stride_c + column[None, :]
    if HAS_BIAS:
        total += tl.load(bias + first_column + column, mask=column < left_columns, other=0.0)[None, :].to(tl.float32)
    live = column < left_columns  # memory behind other columns may hold anything, NaN too
    if LIMIT_COLUMNS:
        live = live & (first_column + column < kept)
        total = tl.where(live[None, :], total, 0.0)
    if STORE_PLAIN:
        tl.store(c + corner + offset, total.to(c.dtype.element_ty), mask=inside)
    if HAS_SUMS:
        beside = tl.load(other + corner + offset, mask=inside & live[None, :], other=0.0).to(tl.float32)
        to_sums = sums + row_tile.to(tl.int64) * columns + first_column + column
        tl.store(to_sums, tl.sum(total * beside, axis=0), mask=column < left_columns)
    if HAS_MASK:
        factor = tl.load(mask + first_column + column, mask=live, other=0.0).to(tl.float32)
        tl.store(c_masked + corner + offset, (total * factor[None, :]).to(c_masked.dtype.element_ty), mask=inside)


@triton.jit
def _column_sums(a, b, sums, rows, columns, stride_a, stride_b, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    row = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)[:, None]
    inside = (row < rows) & (at < columns)[None, :]
    left = tl.load(a + row * stride_a + at[None, :], mask=inside, other=0.0).to(tl.float32)
    right = tl.load(b + row * stride_b + at[None, :], mask=inside, other=0.0).to(tl.float32)
    to = sums + tl.program_id(1).to(tl.int64) * columns + at
    tl.store(to, tl.sum(left * right, axis=0), mask=at < columns)


@dataclass(frozen=True)
class Tiles:
    """Sizes of one program's work, and how it is compiled."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 8


def tiles_for(dtype: torch.dtype, device: torch.device, rows: int, *, even: bool, sums: bool) -> Tiles:
    """By dtype, chip and sizes alone, so that the order of summation never depends on a timing.

    Args:
        dtype: of the operands.
        device: where they are.
        rows: of the product.
        even: 16 divides every size and stride; else loads are narrow, and large tiles would spill.
        sums: the epilogue reads a second matrix, whose tile needs registers too.
    """
    if dtype == torch.float32 or not even:
        return Tiles(64, 64, 32, 4, 3)
    if rows <= 64:
        return Tiles(64, 128, 64, 4, 3)
    wide = capability(device) in WIDE and not sums
    return Tiles(128, 256 if wide else 128, 64, 8, 3)


@dataclass(frozen=True)
class Epilogue:
    """What is made of `C = A B` beside or instead of itself.

    Args:
        plain: store C.
        mask: `[columns]`, store `C ⊙ mask`.
        other: `[rows, columns]`, contiguous; sum `C ⊙ other` over rows.
        bias: `[columns]`, added to C before all that.
        rank: int32 scalar on the device.
        columns: columns from `rank` on are left out: not computed, not written; `mask` counts as 0 there.
        inner: A is 0 from column `rank` on, up to the next multiple of 256: the product stops there.
    """

    plain: bool = True
    mask: torch.Tensor | None = None
    other: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    rank: torch.Tensor | None = None
    columns: bool = False
    inner: bool = False


def product(
    a: torch.Tensor, b: torch.Tensor, epilogue: Epilogue
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """`C = A B` in A's dtype, accumulated in fp32.

    Args:
        a: `[rows, inner]`, its last dimension contiguous.
        b: `[inner, columns]` of any strides, one of them 1.
        epilogue: see there.

    Returns:
        C, `C ⊙ mask` and `Σ_rows C ⊙ other` (fp32), each None if not asked for. Columns that are left out have
        arbitrary values in the first two, and 0 in the sums.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    e, even = epilogue, all(size % 16 == 0 for size in (columns, inner, a.stride(0), *b.stride()) if size > 1)
    t = tiles_for(a.dtype, a.device, rows, even=even, sums=e.other is not None)
    row_tiles = cdiv(rows, t.rows)
    plain = a.new_empty(rows, columns) if e.plain else None
    masked = a.new_empty(rows, columns) if e.mask is not None else None
    sums = None if e.other is None else torch.zeros(row_tiles, columns, dtype=torch.float32, device=a.device)
    grid = (row_tiles * cdiv(columns, t.columns),)
    exact = a.dtype != torch.float32 or not tf32_allowed()
    launch(
        _product,
        grid,
        *(a, b, plain, masked, e.mask, e.other, sums, e.bias, e.rank, rows, columns, inner),
        *(a.stride(0), b.stride(0), b.stride(1), columns),
        HAS_MASK=e.mask is not None,
        HAS_SUMS=e.other is not None,
        HAS_BIAS=e.bias is not None,
        STORE_PLAIN=e.plain,
        LIMIT_COLUMNS=e.rank is not None and e.columns,
        LIMIT_INNER=e.rank is not None and e.inner,
        EVEN_INNER=inner % t.inner == 0,
        PRECISION="ieee" if exact else "tf32",
        BLOCK_ROWS=t.rows,
        BLOCK_COLUMNS=t.columns,
        BLOCK_INNER=t.inner,
        GROUP=t.group,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return plain, masked, None if sums is None else sums.sum(0)


def column_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`Σ_rows a ⊙ b`, fp32 `[columns]`, in an order that depends on the shape alone.

    Args:
        a: `[rows, columns]`, its last dimension contiguous.
        b: likewise.
    """
    rows, columns = a.shape
    sums = a.new_empty(cdiv(rows, CHUNK), columns, dtype=torch.float32)
    grid = (cdiv(columns, 64), len(sums))
    sizes = {"CHUNK": CHUNK, "WIDTH": 64, "num_warps": 8}
    launch(_column_sums, grid, a, b, sums, rows, columns, a.stride(0), b.stride(0), **sizes)
    return sums.sum(0)
