"""Products with 4-bit weights, `int4` and `nf4` alike: decoded in registers, multiplied as 16-bit numbers.

Weights are the rows of the tensor core's product and tokens its columns, so that one token costs eight columns and not
sixteen rows; every tensor is spelt out in the axes of `Fragments`. Up to 16 tokens the warps of a program share its
rows, split the columns and add up at the end; from there to 64 they split the rows, and find each other's activations
in the L1 cache. More tokens, and fp32, are a product for the library, with the weights unpacked once.
"""

from typing import Any

import torch
from torch.nn.functional import linear

from rankwise.errors import RankwiseError
from rankwise.kernels.backend import INTERPRETED, capability, cdiv, launch, power_of_two, sm_count, tl, triton
from rankwise.kernels.fragments import K_WIDTH, MINUS, Fragments, load_in, options, unpack, weights_of, zeros_of

FEW, MANY = 16, 64  # the most tokens for warps that share rows, and for the kernel at all


@triton.jit
def _nothing(GPU: tl.constexpr):
    """0, known only after a barrier: what needs it cannot start before all the loads above have been asked for.

    Left to itself the assembler moves loads down to where registers are free, and the memory waits for the arithmetic.
    """
    if GPU:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $1, $1; barrier.cta.red.popc.aligned.u32 $0, 0, p; }",
            "=r,r", [0], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return 0


@triton.jit(do_not_specialize=["tokens"])
def _linear(
    x, words, scale, zero, bias, y, tokens, m, x_part, x_row, tiles, chunks, groups, per_split,
    PTX: tl.constexpr, PAIRS: tl.constexpr, LEVELS: tl.constexpr, K_WIDTH: tl.constexpr, DTYPE: tl.constexpr,
    S: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
    EVEN: tl.constexpr, W: tl.constexpr, U: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, LEADS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """W warps; of each, U chunks of columns at a time, R tiles of rows, T times eight tokens."""
    WR: tl.constexpr = W if SPLIT_ROWS else 1
    WK: tl.constexpr = W // WR
    PER: tl.constexpr = GROUP // (16 * S)  # chunks that share a scale
    tile0 = tl.program_id(1) * (R * WR)
    first = tl.program_id(2) * per_split
    last = tl.minimum(first + per_split, chunks)

    # The sums in the last brackets are i % (32 S) and i % 16, said so that a lane loads S words, or four columns.
    i = tl.arange(0, U * R * W * 32 * S)  # u r w lane s
    w_tile = tile0 + i // (32 * S) % WR * R + i // (32 * S * W) % R
    w_chunk = first + i // (32 * S * W * R) * WK + i // (32 * S) % WK
    w_at = words + (w_tile * chunks + w_chunk) * (32 * S) + (i // S % 32 * S + i % S)
    i = tl.arange(0, U * R * W * 64)  # u r w g t b
    s_tile = tile0 + i // 64 % WR * R + i // (64 * W) % R
    s_chunk = first + i // (64 * W * R) * WK + i // 64 % WK
    s_at = s_tile * (groups * 16) + i // 8 % 8 * 2 + i % 2
    i = tl.arange(0, U * S * T * W * 128)  # u s n w g t, four columns
    token = tl.minimum((tl.program_id(0) * T + i // (128 * W) % T) * 8 + i // 16 % 8, tokens - 1)
    x_chunk = first + i // (128 * W * T * S) * WK + i // 128 % WK
    x_at = x + token * x_row + x_chunk * (16 * S) + i // (128 * W * T) % S * 16 + (i // 4 % 4 * 4 + i % 4)

    if LEADS:
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([W, R, 2, 8, T, 4, 2], tl.float32)  # w r b g n t c: the tensor core's own order
    ahead = tl.load(w_at, mask=(w_chunk < last) & (w_tile < tiles))
    if FOLLOWS:
        tl.extra.cuda.gdc_wait()
    for done in tl.range(0, last - first, U * WK, num_stages=1):
        packed = ahead
        ahead = tl.load(w_at + (done + U * WK) * (32 * S), mask=(w_chunk + done + U * WK < last) & (w_tile < tiles))
        s_mask = (s_chunk + done < last) & (s_tile < tiles)
        if U * WK % PER == 0:
            here = s_at + s_chunk // PER * 16 + done // PER * 16
        else:
            here = s_at + (s_chunk + done) // PER * 16
        factor = load_in(scale + here, s_mask, EVEN)
        zero0, zero1 = zeros_of(zero, here, s_mask, ZERO, EVEN, PAIRS, U * R * W * 32, S)
        part = load_in(x_at + done * (16 * S), x_chunk + done < last, EVEN)
        for more in tl.static_range(1, PARTS):
            part += load_in(x_at + more * x_part + done * (16 * S), x_chunk + done < last, EVEN)
        nothing = _nothing(PTX is not None)
        a = weights_of(packed, zero0, zero1, nothing, PTX, LEVELS, K_WIDTH, DTYPE, U, R, W, S)
        b = tl.reshape(part.to(DTYPE), [U, S // 2, 2, T, W, 8, 4, 2, 2])  # u s' s n w g t q p
        b = tl.permute(b, [0, 4, 1, 2, 7, 6, 8, 3, 5] if K_WIDTH == 2 else [0, 4, 1, 7, 6, 2, 8, 3, 5])
        b = tl.reshape(b, [U * W, S * 16, T * 8])
        product = tl.reshape(tl.dot(a, b, input_precision="ieee"), [U, W, R, 2, 8, T, 4, 2])
        factor = tl.permute(tl.reshape(factor, [U, R, W, 8, 4, 2]), [0, 2, 1, 5, 3, 4])
        acc += tl.sum(product * tl.reshape(factor.to(tl.float32), [U, W, R, 2, 8, 1, 4, 1]), 0)

    out = tl.reshape(acc if SPLIT_ROWS else tl.sum(acc, 0), [WR * R * 16, T * 8])
    row = tile0 * 16 + tl.arange(0, WR * R * 16)
    column = tl.program_id(0) * (T * 8) + tl.arange(0, T * 8)
    if BIAS:
        out += tl.load(bias + row, mask=row < m, other=0.0).to(tl.float32)[:, None]
    at = y + (tl.program_id(2) * tokens + column)[None, :] * m + row[:, None]
    tl.store(at, out.to(y.dtype.element_ty), mask=(row < m)[:, None] & (column < tokens)[None, :])


@triton.jit
def _total(parts, bias, y, tokens, m, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Partial sums added in order, and the bias."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(1) * m + column
    out = tl.load(parts + at, mask=column < m, other=0.0)
    for split in tl.static_range(1, SPLITS):
        out += tl.load(parts + split * tokens * m + at, mask=column < m, other=0.0)
    if BIAS:
        out += tl.load(bias + column, mask=column < m, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=column < m)


def _sizes(tokens: int, w: Fragments, sms: int, partial: bool) -> tuple[dict[str, int], int]:
    """The kernel's tile, and how many programs share the columns."""
    chunks = w.words.shape[1]
    if tokens > FEW:
        splits = max(1, min(8, chunks // 4, 2 * sms // (cdiv(w.m, 128) * cdiv(tokens, 32))))
        return {"W": 4, "U": 1, "R": 2, "T": 4, "SPLIT_ROWS": 1}, splits
    rows = 2 if tokens > 4 or w.m > 64 * sms else 1
    splits = max(1, min(4, sms // cdiv(w.m, 16 * rows))) if partial else 1
    warps = min(8, power_of_two(cdiv(chunks, splits)))
    deep = min((4 if w.name == "int4" else 2) // rows, power_of_two(cdiv(chunks, splits * warps)))
    return {"W": warps, "U": deep, "R": rows, "T": 1 if tokens <= 8 else 2, "SPLIT_ROWS": 0}, splits


def run(x: torch.Tensor, w: Fragments, bias: torch.Tensor | None, dtype: torch.dtype, **how: bool) -> torch.Tensor:
    """Start the kernel, for up to 64 tokens.

    Args:
        x: `[tokens, n]`, or partial sums `[parts, tokens, n]` in fp32.
        w: the weights.
        bias: `[m]` or None.
        dtype: of the numbers that are multiplied, and of the result.
        how: `partial`: leave the result as partial sums in fp32; `leads`, `follows`: the next launch may start before
            this one ends, this one before the one that makes x ends (compute capability 9.0 and up).

    Returns:
        `[tokens, m]`, or the partial sums `[splits, tokens, m]`.
    """
    partial, leads, follows = (how.get(key, False) for key in ("partial", "leads", "follows"))
    parts = x if x.ndim == 3 else x[None]
    parts = parts if parts.stride(-1) == 1 else parts.contiguous()
    tokens, (tiles, chunks) = x.shape[-2], w.words.shape[:2]
    size, splits = _sizes(tokens, w, sm_count(x.device), partial)
    per_split, whole = cdiv(chunks, splits), not partial and splits == 1
    high, deep = (size["R"] * size["W"], size["U"]) if size["SPLIT_ROWS"] else (size["R"], size["U"] * size["W"])
    even = tiles % high == 0 and chunks == per_split * splits and per_split % deep == 0
    y = x.new_empty((tokens, w.m) if whole else (splits, tokens, w.m), dtype=dtype if whole else torch.float32)
    launch(
        _linear, (cdiv(tokens, 8 * size["T"]), cdiv(tiles, high), splits),
        parts, w.words, w.scale, w.zero, bias if whole else None, y, tokens, w.m, parts.stride(0), parts.stride(1),
        tiles, chunks, w.scale.shape[1], per_split,
        **options(w, dtype), **size, K_WIDTH=K_WIDTH, BIAS=whole and bias is not None, PARTS=len(parts), EVEN=even,
        LEADS=leads, FOLLOWS=follows, num_warps=size["W"], num_stages=1, **({"launch_pdl": True} if follows else {}),
    )  # fmt: skip
    return y if partial or whole else total(y, bias, dtype)


def total(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Partial sums `[splits, tokens, m]` added up."""
    splits, tokens, m = parts.shape
    y = torch.empty(tokens, m, dtype=dtype, device=parts.device)
    launch(
        _total, (cdiv(m, 1024), tokens), parts, bias, y, tokens, m,
        SPLITS=splits, BIAS=bias is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return y


def _takes(x: torch.Tensor, most: int) -> bool:
    """Whether the kernel is the way: few tokens, of 16 bits (fp32 is for the interpreter, and has no tensor cores)."""
    return len(x) <= most and (INTERPRETED or x.dtype in MINUS)


def _run_linear(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, m: int, group: int, name: str,
    bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    w = Fragments(words, scale, zero, m, group, name)
    return run(x, w, bias, x.dtype) if _takes(x, MANY) else linear(x, unpack(w, x.dtype), bias)


def _run_pair(
    x: torch.Tensor,
    v_words: torch.Tensor, v_scale: torch.Tensor, v_zero: torch.Tensor | None, rank: int, v_group: int,
    u_words: torch.Tensor, u_scale: torch.Tensor, u_zero: torch.Tensor | None, m: int, u_group: int,
    name: str, bias: torch.Tensor | None, overlap: bool,
) -> torch.Tensor:  # fmt: skip
    v, u = (
        Fragments(v_words, v_scale, v_zero, rank, v_group, name),
        Fragments(u_words, u_scale, u_zero, m, u_group, name),
    )
    overlap = overlap and capability(x.device) >= 90
    hidden = run(x, v, None, x.dtype, partial=True, leads=overlap)
    return run(hidden, u, bias, x.dtype, follows=overlap)


_linear_op = torch.library.custom_op("rankwise::fourbit_linear", _run_linear, mutates_args=())
_pair_op = torch.library.custom_op("rankwise::fourbit_pair", _run_pair, mutates_args=())


@_linear_op.register_fake
def _(x: torch.Tensor, words: Any, scale: Any, zero: Any, m: int, *_: Any) -> torch.Tensor:
    return x.new_empty(len(x), m)


@_pair_op.register_fake
def _(x: torch.Tensor, *more: Any) -> torch.Tensor:
    return x.new_empty(len(x), more[8])


@torch.library.custom_op("rankwise::fourbit_unpack", mutates_args=())
def _unpack_op(
    words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, m: int, group: int, name: str,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return unpack(Fragments(words, scale, zero, m, group, name), dtype)


@_unpack_op.register_fake
def _(words: torch.Tensor, scale: torch.Tensor, zero: Any, m: int, group: int, name: str, dtype: Any) -> torch.Tensor:
    return words.new_empty(m, scale.shape[1] * group, dtype=dtype)


def product(x: torch.Tensor, w: Fragments, bias: torch.Tensor | None) -> torch.Tensor:
    """`x Wᵀ + b` by kernels, `[..., m]`; where x or b wants a gradient, the library's with the weights unpacked."""
    if x.shape[-1] != w.n:
        raise RankwiseError("x", tuple(x.shape), f"the last dimension is {w.n}, as the weights have columns")
    if _wants_gradient(x, bias):
        return linear(x, _unpack_op(*w, x.dtype), bias)
    return _linear_op(x.reshape(-1, w.n), *w, None if bias is None else bias.contiguous()).view(*x.shape[:-1], w.m)


def pair(x: torch.Tensor, v: Fragments, u: Fragments, bias: torch.Tensor | None, overlap: bool) -> torch.Tensor:
    """`U (V x) + b` by kernels, `[..., m]`; up to 16 tokens the second one adds up the partial sums of the first."""
    rows = x.reshape(-1, x.shape[-1])
    if not _takes(rows, FEW) or x.shape[-1] != v.n or u.n != v.m or v.name != u.name or _wants_gradient(x, bias):
        return product(product(x, v, None), u, bias)
    y = _pair_op(rows, *v[:5], *u, None if bias is None else bias.contiguous(), overlap)
    return y.view(*x.shape[:-1], u.m)


def _wants_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
