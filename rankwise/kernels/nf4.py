"""4-bit NormalFloat weights, `nf4` (QLoRA, 2305.14314), in the bytes of bitsandbytes: blocks of 64 share an absmax."""

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from rankwise.errors import RankwiseError
from rankwise.kernels import fourbit
from rankwise.kernels.backend import use_triton
from rankwise.kernels.fragments import (
    DECODERS,
    Decoder,
    Fragments,
    from_tiles,
    from_words,
    join_nibbles,
    split_nibbles,
    to_tiles,
    to_words,
)

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class NF4(NamedTuple):
    """A matrix `[m, n]` as the file keeps it, n a multiple of 64.

    Args:
        codes: uint8 `[m, n / 2]`, row-major; column 2 j in the high nibble of byte j, column 2 j + 1 in the low one.
            The same bytes as bitsandbytes' flat ones.
        absmax: fp32 `[m, n / 64]`.
    """

    codes: torch.Tensor
    absmax: torch.Tensor


def _ptx(dtype: torch.dtype) -> str:
    """Four codes at once: PRMT looks up their low and high bytes in tables of eight, by three bits of each code.

    It does so for the lower and the upper half of the levels; by the fourth bits another PRMT chooses between the two.
    """
    bits = torch.tensor(LEVELS, device="cpu").to(dtype).view(torch.int16).tolist()
    tables = [  # low bytes of the lower half of the levels, of the upper half, high bytes likewise: four to a word
        sum((bits[half + word + k] >> shift & 255) << 8 * k for k in range(4))
        for shift in (0, 8) for half in (0, 8) for word in (0, 4)
    ]  # fmt: skip
    lines = [".reg .b32 t<8>, code, half, l0, l1, h0, h1, v;"]
    lines += [f"xor.b32 t{k}, $11, {word:#x};" for k, word in enumerate(tables)]
    lines += ["and.b32 code, $8, 0x77777777;", "shr.u32 half, $8, 1;"]
    lines += ["lop3.b32 half, half, 0x44444444, 0x32103210, 0xea;"]
    for k in (0, 4):
        lines += ["shr.u32 code, code, 16;", "shr.u32 half, half, 16;"] if k else []
        lines += [f"prmt.b32 {byte}, t{2 * t}, t{2 * t + 1}, code;" for t, byte in enumerate(("l0", "l1", "h0", "h1"))]
        lines += ["prmt.b32 l0, l0, l1, half;", "prmt.b32 h0, h0, h1, half;"]
        for to, order in ((k, 0x5140), (k + 2, 0x7362)):
            lines += [f"prmt.b32 v, l0, h0, {order:#x};", f"mov.b32 {{${to}, ${to + 1}}}, v;"]
    return "{" + " ".join(lines) + "}"


DECODERS["nf4"] = Decoder("qbp", {dtype: _ptx(dtype) for dtype in (torch.float16, torch.bfloat16)}, LEVELS)


def quantize_nf4(w: torch.Tensor) -> NF4:
    """Round to the nearest level in bitsandbytes' arithmetic: times 1 / absmax, and of two as near the lower one.

    Args:
        w: `[m, n]`, floating point; 64 divides n.

    Raises:
        RankwiseError: 64 does not divide n, or w is empty.
    """
    if w.ndim != 2 or not w.numel() or w.shape[1] % BLOCK:
        raise RankwiseError("w", tuple(w.shape), f"a matrix, not empty, whose number of columns {BLOCK} divides")
    blocks = w.float().unflatten(1, (-1, BLOCK))
    absmax = blocks.abs().amax(2)
    levels = torch.tensor(LEVELS, device=w.device)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[..., None]).clamp(-1, 1)
    codes = torch.bucketize(scaled.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return NF4(join_nibbles(codes.flatten(1), high_first=True), absmax)


def dequantize_nf4(w: NF4 | Fragments, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`level[code] · absmax`, `[m, n]`, rounded once."""
    plain = unpack_nf4(w) if isinstance(w, Fragments) else w
    codes = plain.codes
    levels = torch.tensor(LEVELS, device=codes.device)
    pairs = torch.cartesian_prod(levels, levels)  # what each byte stands for
    numbers = pairs.index_select(0, codes.flatten().int()).view(len(codes), -1, BLOCK)
    return (numbers * plain.absmax[..., None]).flatten(1).to(dtype)


def repack_nf4(w: NF4) -> Fragments:
    """The kernels' order, made once when the weights are loaded.

    Raises:
        RankwiseError: shapes that do not belong together.
    """
    m, half = w.codes.shape
    if w.absmax.shape != (m, 2 * half // BLOCK):
        raise RankwiseError("absmax", tuple(w.absmax.shape), f"[{m}, {2 * half // BLOCK}]: one for each block of 64")
    words = to_words(split_nibbles(w.codes, high_first=True), "nf4", BLOCK)
    return Fragments(words, to_tiles(w.absmax), None, m, BLOCK, "nf4")


def unpack_nf4(w: Fragments) -> NF4:
    """The inverse of `repack_nf4`."""
    return NF4(join_nibbles(from_words(w.words, w.name, w.m), high_first=True), from_tiles(w.scale, w.m))


def nf4_linear(x: torch.Tensor, w: NF4 | Fragments, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply `y = x Wᵀ + b`.

    On a GPU weights in the kernels' order are decoded in registers for up to 64 tokens, and unpacked once for more,
    their levels rounded to x's dtype; gradients come back to x and the bias. Elsewhere, and in the file's order, this
    is PyTorch's product with `dequantize_nf4`.

    Args:
        x: `[..., n]`, floating point.
        w: `[m, n]`.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.

    Raises:
        RankwiseError: x and W do not fit, on a GPU.
    """
    if isinstance(w, Fragments) and use_triton(x):
        return fourbit.product(x, w, bias)
    return linear(x, dequantize_nf4(w, x.dtype), bias)


def nf4_lowrank(
    x: torch.Tensor,
    v: NF4 | Fragments,
    u: NF4 | Fragments,
    bias: torch.Tensor | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """Apply `y = U (V x) + b`, as `int4_lowrank` does."""
    if isinstance(v, Fragments) and isinstance(u, Fragments) and use_triton(x):
        return fourbit.pair(x, v, u, bias, overlap)
    return nf4_linear(nf4_linear(x, v), u, bias)
