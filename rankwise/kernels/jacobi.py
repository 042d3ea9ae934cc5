"""Batched one-sided block Jacobi: orthogonal `J` such that the rows of `J X` are orthogonal, for many matrices at once.

One sweep lets every pair of row blocks meet once. A meeting takes the Gram matrix of the two blocks' rows from X,
rotates its pairs of rows in parallel (pairs of step k: rows i and i xor k), and applies the product of those rotations
to the blocks' rows of `[X | J]`. As X itself is rotated, small singular values keep their digits (Demmel & Veselić
1992). Blocks meet in the order of a round-robin tournament.
"""

import torch

from rankwise.kernels.backend import cdiv, launch, power_of_two, tl, triton, use_triton
from rankwise.kernels.precision import full_precision

SWEEPS = 30  # a random matrix takes 6 to 10
LARGEST = {torch.float32: 64, torch.float64: 32}  # rows that one program rotates; more are cut in blocks of half that
INNER = 8  # sweeps over a Gram matrix of all rows; 1 where blocks meet again and again


@triton.jit
def _rows_of(pair, step, at, BLOCKS: tl.constexpr, HALF: tl.constexpr):
    """Rows `at` of the two blocks that meet as one pair of a step: the circle method, the last block stays."""
    others: tl.constexpr = BLOCKS - 1
    one = (step + pair) % others
    other = tl.where(pair == 0, others, (step + others - pair) % others)
    return tl.where(at < HALF, tl.minimum(one, other), tl.maximum(one, other)) * HALF + at % HALF


@triton.jit
def _rotate_pairs(gram, turn, mine, k, tol, floor, T: tl.constexpr):
    """Rotate rows i and i xor k of all i at once; also how far from orthogonal the worst of them was.

    The angle may be rough, for a later sweep mends it; sine and cosine must belong to each other, hence Newton's steps.
    """
    at = tl.arange(0, T)
    partner = at ^ k
    its = tl.gather(mine, partner, 0)
    product = tl.sum(tl.where(at[None, :] == partner[:, None], gram, 0), 1)
    product = tl.where(at < partner, product, tl.gather(product, partner, 0))  # both rows must see the same number
    inverse = tl.rsqrt(tl.maximum(mine.to(tl.float32), 2e-38)) * tl.rsqrt(tl.maximum(its.to(tl.float32), 2e-38))
    angle = tl.clamp(product.to(tl.float32) * inverse, -1e18, 1e18)  # its square is a number
    rotates = tl.abs(angle) > tol
    worst = tl.where(rotates & (tl.minimum(mine, its) > floor), tl.abs(angle), 0)
    excess = (its - mine).to(tl.float32) * inverse
    size = tl.minimum(tl.abs(excess), 1e18)
    tangent = 2 * angle / (size + tl.sqrt(size * size + 4 * angle * angle) + 2e-38)
    flips = (excess < 0) | ((excess == 0) & (at > partner))
    tangent = tl.where(rotates, tl.where(flips, -tangent, tangent), 0)
    cosine, tangent = tl.rsqrt(1 + tangent * tangent).to(mine.dtype), tangent.to(mine.dtype)
    square = 0.5 + 0.5 * tangent * tangent
    for _ in tl.static_range(3 if mine.dtype == tl.float64 else 1):
        cosine = cosine * (1.5 - square * cosine * cosine)
    swaps = ((excess > 0) & (at < partner)) | ((excess < 0) & (at > partner))  # the longer row comes first
    own = tl.where(swaps, cosine * tangent, cosine)
    other = tl.where(swaps, cosine, -cosine * tangent)
    mine = tl.maximum(tl.where(swaps, its + tangent * product, mine - tangent * product), 0)
    rows = tl.broadcast_to(partner[:, None], (T, T))
    columns = tl.broadcast_to(partner[None, :], (T, T))
    gram = own[:, None] * gram + other[:, None] * tl.gather(gram, rows, 0)
    gram = own[None, :] * gram + other[None, :] * tl.gather(gram, columns, 1)
    turn = own[:, None] * turn + other[:, None] * tl.gather(turn, rows, 0)
    return gram, turn, mine, tl.max(worst, 0)


@triton.jit(do_not_specialize=["step"])
def _meet(
    p, turns, worst, done, step, size, stride, width, tol, floor,
    BLOCKS: tl.constexpr, HALF: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Rotations `[T, T]` that make the rows of two blocks orthogonal to each other, and how far they were from it."""
    T: tl.constexpr = 2 * HALF
    pair, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(done + matrix) != 0:
        return
    at = tl.arange(0, T)
    rows = _rows_of(pair, step, at, BLOCKS, HALF)
    tile = p + (matrix * size + rows[:, None]) * stride + at[None, :]
    gram = tl.zeros((T, T), p.dtype.element_ty)
    for start in range(0, width, T):
        x = tl.load(tile + start)
        gram = tl.dot(x, tl.trans(x), gram, input_precision="ieee", out_dtype=p.dtype.element_ty)
    turn = tl.where(at[:, None] == at[None, :], 1.0, 0.0).to(p.dtype.element_ty)
    found, latest, sweep = 0.0, 2.0, 0
    while (sweep < INNER) & (latest > tol):
        latest = 0.0
        mine = tl.maximum(tl.sum(tl.where(at[:, None] == at[None, :], gram, 0), 1), 0)  # no row is below the padding
        for k in range(1, T):
            gram, turn, mine, angle = _rotate_pairs(gram, turn, mine, k, tol, floor, T)
            latest = tl.maximum(latest, angle)
        found = tl.maximum(found, latest)
        sweep += 1
    tl.store(turns + ((matrix * (BLOCKS // 2) + pair) * T + at[:, None]) * T + at[None, :], turn)
    tl.atomic_max(worst + matrix, found)


@triton.jit(do_not_specialize=["step"])
def _turn(p, turns, done, step, size, stride, BLOCKS: tl.constexpr, HALF: tl.constexpr, BK: tl.constexpr):
    """Apply the rotations of a meeting to one tile of columns of its rows, in place."""
    T: tl.constexpr = 2 * HALF
    pair, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(done + matrix) != 0:
        return
    at, few = tl.arange(0, T), tl.arange(0, BK)
    turn = turns + ((matrix * (BLOCKS // 2) + pair) * T + at[:, None]) * T + few[None, :]
    columns = p + tl.program_id(2) * T + at[None, :]
    y = tl.zeros((T, T), p.dtype.element_ty)
    for start in range(0, T, BK):
        rows = _rows_of(pair, step, start + few, BLOCKS, HALF)
        x = tl.load(columns + (matrix * size + rows[:, None]) * stride)
        y = tl.dot(tl.load(turn + start), x, y, input_precision="ieee", out_dtype=p.dtype.element_ty)
    tl.debug_barrier()  # no row is overwritten that another warp has yet to read
    rows = _rows_of(pair, step, at, BLOCKS, HALF)
    tl.store(columns + (matrix * size + rows[:, None]) * stride, y)


def jacobi_sweep(
    p: torch.Tensor,
    width: int,
    half: int,
    turns: torch.Tensor,
    worst: torch.Tensor,
    done: torch.Tensor,
    tol: float,
    floor: float,
) -> None:
    """Let every pair of blocks of rows meet once, in place; nothing is read back.

    Args:
        p: `[b, size, stride]`, contiguous: `[X | J]`, both padded with zeros to a multiple of `2 half`.
        width: columns of X, padding included.
        half: rows of a block, a power of two from 8.
        turns: `[b, size // (2 half), 2 half, 2 half]`, scratch.
        worst: `[b]` fp32, raised to the largest |cosine| of two rows that was found.
        done: `[b]` int32; matrices where it is not 0 stay as they are.
        tol: |cosine| below which two rows count as orthogonal.
        floor: rows shorter than that do not count.
    """
    batch, size, stride = p.shape
    blocks = size // half
    inner = INNER if blocks == 2 else 1
    warps = 4 if half <= 16 and p.dtype == torch.float32 else 8
    for step in range(blocks - 1):
        launch(
            _meet, (blocks // 2, batch), p, turns, worst, done, step, size, stride, width, tol, floor * floor,
            BLOCKS=blocks, HALF=half, INNER=inner, num_warps=warps, num_stages=2,
        )  # fmt: skip
        launch(
            _turn, (blocks // 2, batch, stride // (2 * half)), p, turns, done, step, size, stride,
            BLOCKS=blocks, HALF=half, BK=16, num_warps=4, num_stages=2,
        )  # fmt: skip


def jacobi(
    x: torch.Tensor, *, floor: float | None = None, half: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors and singular values of a batch of matrices.

    Args:
        x: `[b, s, l]`, fp32 or fp64, finite; s is best at most l.
        floor: rows shorter than this share of the norm of x may stay oblique; 16 eps by default, where rounding errors
            begin. Rows that are nearly orthogonal from the start stay exact far below that.
        half: rows of a block, a power of two from 8; None chooses.

    Returns:
        basis `[b, s, s]`, orthogonal, a singular vector a row, and values `[b, s]` fp64, falling: the rows of
        `basis @ x` are orthogonal and their norms are `values`. Values below `s eps` times the largest are rounding
        errors, unless the matrix is well conditioned but for the lengths of its rows.

    Raises:
        torch.linalg.LinAlgError: no convergence.
    """
    if not use_triton(x.new_empty(0, dtype=torch.float32)):  # fp64 too: these kernels have it
        return jacobi_reference(x)
    batch, s, _ = x.shape
    if x.numel() == 0:
        return torch.eye(s, dtype=x.dtype, device=x.device).repeat(batch, 1, 1), x.new_zeros(batch, s).double()
    half = half or max(8, min(LARGEST[x.dtype], power_of_two(s)) // 2)
    largest = x.abs().amax((1, 2), keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1)
    p, width = _padded(x / norm, half)
    _until_orthogonal(p, width, half, 16 * torch.finfo(x.dtype).eps if floor is None else floor)
    drift = p[:, :s, width:].double().norm(dim=2)  # rounding makes turned rows longer or shorter, J's and X's alike
    values = p[:, :s, :width].double().norm(dim=2) / drift * (norm * largest)[:, :, 0].double()
    values, order = values.sort(dim=1, descending=True)
    basis = p[:, :s, width : width + s].gather(1, order[:, :, None].expand(-1, -1, s))
    with full_precision(x.device):  # takes back what rounding did to orthogonality
        return 1.5 * basis - 0.5 * (basis @ basis.mT) @ basis, values


def jacobi_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from LAPACK or cuSOLVER, computed in fp64."""
    u, values, _ = torch.linalg.svd(x.double(), full_matrices=x.shape[1] > x.shape[2])
    missing = x.shape[1] - values.shape[1]
    return u.mT.to(x.dtype), torch.nn.functional.pad(values, (0, missing))


def _padded(x: torch.Tensor, half: int) -> tuple[torch.Tensor, int]:
    """`[X | J]` with J the identity, longest rows first, and the columns of X in it."""
    batch, s, length = x.shape
    tile = 2 * half
    size, width = cdiv(s, tile) * tile, cdiv(length, tile) * tile
    p = x.new_zeros(batch, size, width + size)
    order = x.norm(dim=2).sort(dim=1, descending=True).indices
    p[:, :s, :length] = x.gather(1, order[:, :, None].expand_as(x))
    p[:, :s, width : width + s].scatter_(2, order[:, :, None], 1)
    return p, width


def _until_orthogonal(p: torch.Tensor, width: int, half: int, floor: float) -> None:
    """Sweep until all rows are orthogonal; the host looks once a sweep."""
    batch, size, _ = p.shape
    tol = torch.finfo(p.dtype).eps * max(8.0, 2 * width**0.5)
    turns = p.new_empty(batch, size // (2 * half), 2 * half, 2 * half)
    worst = torch.zeros(batch, device=p.device)
    done = torch.zeros(batch, device=p.device, dtype=torch.int32)
    for _ in range(SWEEPS):
        jacobi_sweep(p, width, half, turns, worst.zero_(), done, tol, floor)
        done |= worst <= 16 * tol  # and this very sweep turned those rows as well
        if bool(done.all()):
            return
    raise torch.linalg.LinAlgError(f"block Jacobi: rows still {float(worst.max()):.1e} from orthogonal")
