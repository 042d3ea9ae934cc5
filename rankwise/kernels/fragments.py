"""The order in which 4-bit kernels keep weights, and how numbers come out of it.

A tile of 16 rows and a chunk of 32 or 64 columns are one warp's load. Lane 4 g + t holds, of step s of 16 columns, the
codes at rows g and g + 8 and columns 16 s + 4 t + (0..3), in one word of 32 bits; its words of a chunk lie side by
side. These are the very registers that `mma.m16n8k16` wants of that lane, so a warp reads its weights with wide loads
and multiplies them without a trip through shared memory.
"""

from typing import Any, NamedTuple

import torch

from rankwise.kernels.backend import AVAILABLE, INTERPRETED, cdiv, launch, tl, triton

TILE = 16  # rows of a tensor core's operand
# Columns that the compiler gives a lane side by side in a product of tensors that were joined: that order of columns
# makes the product's operands out of what the lane has. Another answer would cost time, and change nothing else.
K_WIDTH = 4 if AVAILABLE and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2
# To be added to a zero point: -(128 + zero) in bf16, -(1024 + zero) in fp16.
MINUS = {torch.bfloat16: 0xC300, torch.float16: 0xE400}


class Decoder(NamedTuple):
    """How the lanes read a code.

    Args:
        nibbles: which of a word's eight nibbles is of which row 8 b + g and column 4 t + 2 q + p: what the bits of its
            place mean, the highest first.
        ptx: by dtype, what turns the word `$8` into eight numbers `$0`..`$7`, b, q and p in their places as `q b p`;
            `$9` and `$10` are pairs of `-(128 + zero)` (bf16; 1024 in fp16) of rows b = 0 and 1, `$11` is 0.
        levels: of the codes; None where a code stands for itself less the zero point.
    """

    nibbles: str
    ptx: dict[torch.dtype, str]
    levels: tuple[float, ...] | None


DECODERS: dict[str, Decoder] = {}  # int4 and nf4 put theirs here


class Fragments(NamedTuple):
    """A 4-bit matrix `[m, n]` in the kernels' order, made once when it is loaded.

    Args:
        words: int32 `[tiles, chunks, 32, chunk / 16]`, 8 codes a word; `tiles = ⌈m / 16⌉`.
        scale: `[tiles, groups, 8, 2]`; entry (g, b) belongs to row 8 b + g of the tile. 0 for rows from m.
        zero: int16, laid out as `scale`, or None: 8 if codes are numbers.
        m: rows.
        group: columns that share a scale.
        name: `int4` or `nf4`.
    """

    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    m: int
    group: int
    name: str

    @property
    def n(self) -> int:
        """Columns."""
        return self.scale.shape[1] * self.group


def to_words(codes: torch.Tensor, name: str, chunk: int) -> torch.Tensor:
    """Codes 0..15, uint8 `[m, n]`, as words; rows are filled up to a multiple of 16 with code 0."""
    m, n = codes.shape
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -m % TILE))
    split = padded.view(-1, 2, 8, n // chunk, chunk // 16, 4, 2, 2)  # u b g c s t q p
    order = ["ubgcstqp".index(axis) for axis in "ucgts" + DECODERS[name].nibbles]
    nibbles = split.permute(order).reshape(-1, n // chunk, 32, chunk // 16, 8).to(torch.int32)
    words = nibbles[..., 0].clone()
    for place in range(1, 8):
        words |= nibbles[..., place] << 4 * place
    return words


def from_words(words: torch.Tensor, name: str, m: int) -> torch.Tensor:
    """The codes that `to_words` packed, uint8 `[m, n]`."""
    tiles, chunks, _, steps = words.shape
    places = 4 * torch.arange(8, dtype=torch.int32, device=words.device)
    nibbles = (words[..., None] >> places & 15).to(torch.uint8)
    axes = "ucgts" + DECODERS[name].nibbles
    order = [axes.index(axis) for axis in "ubgcstqp"]
    codes = nibbles.view(tiles, chunks, 8, 4, steps, 2, 2, 2).permute(order)
    return codes.reshape(tiles * TILE, chunks * steps * TILE)[:m]


def to_tiles(rows: torch.Tensor) -> torch.Tensor:
    """What belongs to rows and groups, `[m, groups]`, in the order of `Fragments.scale`; 0 for rows from m."""
    m, groups = rows.shape
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -m % TILE))
    return padded.view(-1, 2, 8, groups).permute(0, 3, 2, 1).contiguous()


def from_tiles(tiles: torch.Tensor, m: int) -> torch.Tensor:
    """The inverse of `to_tiles`."""
    return tiles.permute(0, 3, 2, 1).reshape(-1, tiles.shape[1])[:m].contiguous()


def join_nibbles(codes: torch.Tensor, high_first: bool) -> torch.Tensor:
    """Codes 0..15, uint8 `[m, n]`, two a byte along the row: `[m, n / 2]`."""
    even, odd = codes[:, 0::2], codes[:, 1::2]
    return even << 4 | odd if high_first else odd << 4 | even


def split_nibbles(packed: torch.Tensor, high_first: bool) -> torch.Tensor:
    """The inverse of `join_nibbles`."""
    low, high = packed & 15, packed >> 4
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(1)


@triton.jit
def load_in(at, mask, EVEN: tl.constexpr):
    """0 outside the mask, where EVEN does not promise that there is no outside."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=0)


@triton.jit
def zeros_of(
    zero, at, mask, ZERO: tl.constexpr, EVEN: tl.constexpr, PAIRS: tl.constexpr, N: tl.constexpr, S: tl.constexpr
):
    """Zero points of a lane's rows b = 0 and 1, for each of its words."""
    if ZERO:
        zero0, zero1 = tl.split(tl.reshape(load_in(zero + at, mask, EVEN).to(tl.int32), [N, 2]))
    else:
        zero0, zero1 = tl.full([N], 8, tl.int32), tl.full([N], 8, tl.int32)
    if PAIRS:  # as the two numbers -(128 + zero) in bf16, -(1024 + zero) in fp16, in one register
        zero0, zero1 = (zero0 + PAIRS) * 0x10001, (zero1 + PAIRS) * 0x10001
    zero0 = tl.reshape(tl.broadcast_to(zero0[:, None], [N, S]), [N * S])
    zero1 = tl.reshape(tl.broadcast_to(zero1[:, None], [N, S]), [N * S])
    return zero0, zero1


@triton.jit
def weights_of(
    words, zero0, zero1, nothing, PTX: tl.constexpr, LEVELS: tl.constexpr, K_WIDTH: tl.constexpr, DTYPE: tl.constexpr,
    U: tl.constexpr, R: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Words `[u r w lane s]`, flat, as numbers `[u w, r b g, columns]`, before they are scaled."""
    N: tl.constexpr = U * R * W * 32 * S
    if PTX is not None:
        D = tl.zeros([1], DTYPE).dtype  # not a constexpr, as the next line wants it
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            PTX, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r", [words, zero0, zero1, nothing],
            (D, D, D, D, D, D, D, D), is_pure=True, pack=1,
        )  # fmt: skip
        pairs = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    else:
        codes = tl.reshape((words[:, None] >> (tl.arange(0, 8) * 4)[None, :]) & 15, [N, 2, 2, 2])
        if LEVELS is not None:  # nibbles q b p
            numbers = tl.zeros([N, 2, 2, 2], tl.float32)
            for code in tl.static_range(16):
                numbers = tl.where(codes == code, LEVELS[code], numbers)
            pairs = tl.permute(numbers, [0, 3, 2, 1]).to(DTYPE)
        else:  # nibbles p q b
            numbers = codes - tl.reshape(tl.join(zero0, zero1), [N, 1, 1, 2])
            pairs = tl.permute(numbers, [0, 1, 3, 2]).to(tl.float32).to(DTYPE)
    full = tl.reshape(pairs, [U, R, W, 8, 4, S // 2, 2, 2, 2, 2])  # u r w g t s' s p b q
    if K_WIDTH == 2:  # columns in the order in which the compiler hands them to lanes
        full = tl.permute(full, [0, 2, 1, 8, 3, 5, 6, 9, 4, 7])
    elif K_WIDTH == 4:
        full = tl.permute(full, [0, 2, 1, 8, 3, 5, 9, 4, 6, 7])
    else:  # as they are
        full = tl.permute(full, [0, 2, 1, 8, 3, 5, 6, 4, 9, 7])
    return tl.reshape(full, [U * W, R * 16, S * 16])


@triton.jit
def _unpack(
    words, scale, zero, out, m, chunks, groups,
    PTX: tl.constexpr, PAIRS: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr, S: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """16 rows and W chunks of the matrix, in its own order."""
    tile, first = tl.program_id(1), tl.program_id(0) * W
    i = tl.arange(0, W * 32 * S)  # w lane s
    chunk = first + i // (32 * S)
    packed = tl.load(words + (tile * chunks + chunk) * (32 * S) + i % (32 * S), mask=chunk < chunks)
    i = tl.arange(0, W * 64)  # w g t b
    chunk = first + i // 64
    at = (tile * groups + chunk * (16 * S) // GROUP) * 16 + i // 8 % 8 * 2 + i % 2
    zero0, zero1 = zeros_of(zero, at, chunk < chunks, ZERO, False, PAIRS, W * 32, S)
    numbers = weights_of(packed, zero0, zero1, 0, PTX, LEVELS, 0, DTYPE, 1, 1, W, S).to(tl.float32)
    row, chunk = tl.arange(0, 16), first + tl.arange(0, W)
    at = (tile * groups + chunk * (16 * S) // GROUP)[:, None] * 16 + (row % 8 * 2 + row // 8)[None, :]
    factor = tl.load(scale + at, mask=(chunk < chunks)[:, None], other=0.0).to(tl.float32)
    numbers = (numbers * factor[:, :, None]).to(out.dtype.element_ty)
    column = chunk[:, None] * (16 * S) + tl.arange(0, 16 * S)[None, :]
    row = tile * 16 + row
    at = row.to(tl.int64)[None, :, None] * chunks * (16 * S) + column[:, None, :]
    tl.store(out + at, numbers, mask=(row < m)[None, :, None] & (chunk < chunks)[:, None, None])


def options(w: Fragments, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of a kernel that reads `w` as numbers of a dtype."""
    how = DECODERS[w.name]
    ptx = None if INTERPRETED else how.ptx.get(dtype)
    kind = getattr(tl, str(dtype).removeprefix("torch."))
    numbers = {"PTX": ptx, "PAIRS": MINUS[dtype] if ptx else 0, "LEVELS": how.levels, "DTYPE": kind}
    return numbers | {"S": w.words.shape[-1], "GROUP": w.group, "ZERO": w.zero is not None}


def unpack(w: Fragments, dtype: torch.dtype) -> torch.Tensor:
    """The matrix `[m, n]`, by a kernel."""
    tiles, chunks, _, _ = w.words.shape
    out = torch.empty(w.m, w.n, dtype=dtype, device=w.words.device)
    launch(
        _unpack, (cdiv(chunks, 4), tiles), w.words, w.scale, w.zero, out, w.m, chunks, w.scale.shape[1],
        **options(w, dtype), W=4, num_warps=4,
    )  # fmt: skip
    return out
