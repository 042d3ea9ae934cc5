"""Products with `int8` weights: read as the file has them, decoded in registers, multiplied as 16-bit numbers.

A row has one scale, so the kernel sums products with codes and scales at the end. Weights are the rows of the tensor
core's product and up to 64 tokens its columns. Programs that share the columns of a few rows leave partial sums, added
in their order. More tokens, and fp32, are a product for the library, with the weights written out once.
"""

from typing import Any

import torch
from torch.nn.functional import linear

from rankwise.errors import RankwiseError
from rankwise.kernels.backend import INTERPRETED, capability, cdiv, launch, power_of_two, sm_count, tl, triton
from rankwise.kernels.fourbit import total

WIDTH = 16  # columns, which are bytes, of one thread's load
FEW, MANY = 16, 64  # the most tokens of a pair in two launches, and of the kernel at all


def _ptx(dtype: torch.dtype) -> str:
    """Four codes `$2` as four numbers, in pairs `$0` and `$1`.

    In bf16 the bytes `43 c` are 128 + (c & 127), or, with the other bits of c, 128 or 256: the difference is c. In fp16
    the bytes `64 (c + 128)` are 1152 + c.
    """
    bf16 = dtype == torch.bfloat16
    lines = [".reg .b32 v, a, b, top, one, less;", f"mov.b32 top, {0x43434343 if bf16 else 0x64646464:#x};"]
    lines += ["mov.b32 one, 0xbf80bf80;"] if bf16 else ["mov.b32 one, 0x3c003c00;", "mov.b32 less, 0xe480e480;"]
    source = "$2"
    if not bf16:
        lines, source = [*lines, "xor.b32 a, $2, 0x80808080;"], "a"
    for pair, selector in enumerate((0x4140, 0x4342)):
        lines.append(f"prmt.b32 v, {source}, top, {selector:#x};")
        if bf16:
            lines += ["and.b32 a, v, 0xff7fff7f;", "and.b32 b, v, 0xff80ff80;", f"fma.rn.bf16x2 ${pair}, b, one, a;"]
        else:
            lines.append(f"fma.rn.f16x2 ${pair}, v, one, less;")
    return "{" + " ".join(lines) + "}"


PTX = {dtype: _ptx(dtype) for dtype in (torch.bfloat16, torch.float16)}


@triton.jit
def _numbers(codes, DECODE: tl.constexpr, DTYPE: tl.constexpr):
    """Codes as numbers of a 16-bit dtype, which holds them all."""
    if DECODE is not None:
        D = tl.zeros([1], DTYPE).dtype  # not a constexpr, as the next line wants it
        return tl.inline_asm_elementwise(DECODE, "=&r,=&r,r", [codes], D, is_pure=True, pack=4)
    else:
        return codes.to(tl.float32).to(DTYPE)


@triton.jit
def _step(
    weights, inputs, sums, at, width, x_part,
    DECODE: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One round of the reduction, of columns `at`."""
    found = tl.load(weights, mask=(at < width)[None, :], other=0)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    value = tl.load(inputs, mask=(at < width)[:, None], other=0.0)
    for part in tl.static_range(1, PARTS):
        value += tl.load(inputs + part * x_part, mask=(at < width)[:, None], other=0.0)
    return tl.dot(_numbers(found, DECODE, DTYPE), value.to(DTYPE), sums, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def _linear(
    x, codes, scale, bias, y, tokens, m, m_filled, width, row_stride, x_part, x_row, per_split,
    DECODE: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    INNER: tl.constexpr, TOKENS: tl.constexpr, LEADS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """Some rows and columns for up to TOKENS tokens. Results of rows m to m_filled are 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    first = tl.program_id(1) * per_split
    count = tl.minimum(per_split, width - first)
    at = first + tl.arange(0, INNER)
    weights = codes + tl.minimum(row, m - 1).to(tl.int64)[:, None] * row_stride + at[None, :]
    inputs = x + tl.minimum(token, tokens - 1)[None, :] * x_row + at[:, None]
    if LEADS:
        tl.extra.cuda.gdc_launch_dependents()
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    if FOLLOWS:  # x is there only after a wait, the first weights are asked for before it
        sums = _step(weights, inputs, sums, at, width, x_part, DECODE, DTYPE, PARTS, True)
    for done in range(INNER if FOLLOWS else 0, count, INNER):
        sums = _step(weights + done, inputs + done, sums, at + done, width, x_part, DECODE, DTYPE, PARTS, False)
    out = sums * tl.load(scale + row, mask=row < m, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        out += tl.load(bias + row, mask=row < m, other=0.0).to(tl.float32)[:, None]
    out = tl.where((row < m)[:, None], out, 0.0)
    to = y + (tl.program_id(1) * tokens + token)[None, :] * m_filled + row[:, None]
    tl.store(to, out.to(y.dtype.element_ty), mask=(row < m_filled)[:, None] & (token < tokens)[None, :])


@triton.jit
def _write_out(codes, scale, out, n, row_stride, INNER: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * INNER + tl.arange(0, INNER)
    found = tl.load(codes + row * row_stride + at, mask=at < n, other=0).to(tl.float32)
    tl.store(out + row * n + at, (found * tl.load(scale + row).to(tl.float32)).to(out.dtype.element_ty), mask=at < n)


def _sizes(tokens: int, m: int, width: int, sms: int) -> tuple[dict[str, int], int]:
    """The kernel's tile with the compiler's options, and columns of one program."""
    if tokens <= FEW:
        size = {"ROWS": 32, "INNER": 256, "TOKENS": 16, "num_warps": 2, "num_stages": 4}
    else:
        size = {"ROWS": 64, "INNER": 128, "TOKENS": power_of_two(tokens), "num_warps": 4, "num_stages": 3}
    rounds, programs = cdiv(width, size["INNER"]), max(1, cdiv(m, size["ROWS"]))
    splits = max(1, min(4, sms // programs, rounds // 2))
    return size, cdiv(rounds, splits) * size["INNER"]


def _readable(codes: torch.Tensor) -> int:
    """Columns that a row may be read to: whole loads, if there is memory behind the last row for that."""
    m, n = codes.shape
    up = cdiv(n, WIDTH) * WIDTH
    end = codes.storage_offset() + (m - 1) * codes.stride(0) + up
    return up if codes.stride(0) % WIDTH == 0 and end <= codes.untyped_storage().nbytes() else n


def run(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
    *, partial: bool = False, leads: bool = False, follows: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Start the kernel, for 1 to 64 tokens.

    Args:
        x: `[tokens, n]`, or partial sums `[parts, tokens, n]` in fp32, which may have zeros behind column n.
        codes: int8 `[m, n]`, its columns side by side.
        scale: bf16 `[m, 1]`.
        bias: `[m]` or None.
        dtype: of the numbers that are multiplied, and of the result.
        partial: leave the result as partial sums in fp32, with zeros up to a multiple of 16 rows.
        leads: the next launch may start before this one ends (compute capability 9.0 and up).
        follows: this one before the one that makes x ends.

    Returns:
        `[tokens, m]`, or the partial sums `[splits, tokens, ⌈m / 16⌉ · 16]`.
    """
    parts = x if x.ndim == 3 else x[None]
    tokens, m, width = x.shape[-2], len(codes), _readable(codes)
    if parts.shape[-1] < width or parts.stride(-1) != 1:
        parts = torch.nn.functional.pad(parts, (0, width - parts.shape[-1])).contiguous()
    size, per_split = _sizes(tokens, m, width, sm_count(x.device))
    size |= {"INNER": 128, "num_stages": 3} if len(parts) > 1 else {}  # they are fp32, and several
    splits = cdiv(width, per_split)
    whole = not partial and splits == 1
    filled = cdiv(m, WIDTH) * WIDTH if partial else m
    y = x.new_empty((tokens, m) if whole else (splits, tokens, filled), dtype=dtype if whole else torch.float32)
    decode = None if INTERPRETED or torch.version.hip else PTX.get(dtype)
    known: dict[str, Any] = {"DECODE": decode, "PARTS": len(parts)}
    known |= {"DTYPE": getattr(tl, str(dtype).removeprefix("torch.")), "BIAS": whole and bias is not None}
    known |= {"LEADS": leads, "FOLLOWS": follows, **size, **({"launch_pdl": True} if follows else {})}
    launch(
        _linear, (cdiv(m, size["ROWS"]), splits), parts, codes, scale, bias if whole else None, y, tokens, m, filled,
        width, codes.stride(0), parts.stride(0), parts.stride(1), per_split, **known,
    )  # fmt: skip
    return y if partial or whole else total(y, bias, dtype)


def write_out(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix `[m, n]`, by a kernel."""
    m, n = codes.shape
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    launch(_write_out, (m, cdiv(n, 1024)), codes, scale, out, n, codes.stride(0), INNER=1024, num_warps=4)
    return out


def _takes(x: torch.Tensor, most: int) -> bool:
    """Whether the kernel is the way: few tokens, of 16 bits (fp32 is for the interpreter, and has no tensor cores)."""
    return len(x) <= most and (INTERPRETED or x.dtype in PTX)


def _run_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:  # fmt: skip
    if not len(x):
        return x.new_empty(0, len(codes))
    return run(x, codes, scale, bias, x.dtype) if _takes(x, MANY) else linear(x, write_out(codes, scale, x.dtype), bias)


def _run_pair(
    x: torch.Tensor, v_codes: torch.Tensor, v_scale: torch.Tensor, u_codes: torch.Tensor, u_scale: torch.Tensor,
    bias: torch.Tensor | None, overlap: bool,
) -> torch.Tensor:  # fmt: skip
    overlap = overlap and capability(x.device) >= 90
    hidden = run(x, v_codes, v_scale, None, x.dtype, partial=True, leads=overlap)
    return run(hidden, u_codes, u_scale, bias, x.dtype, follows=overlap)


_linear_op = torch.library.custom_op("rankwise::int8_linear", _run_linear, mutates_args=())
_pair_op = torch.library.custom_op("rankwise::int8_pair", _run_pair, mutates_args=())


@_linear_op.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(len(x), len(codes))


@_pair_op.register_fake
def _(x: torch.Tensor, *more: Any) -> torch.Tensor:
    return x.new_empty(len(x), len(more[2]))


def product(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:  # fmt: skip
    """`x Wᵀ + b` by kernels, `[..., m]`; no gradient."""
    m, n = codes.shape
    if x.shape[-1] != n:
        raise RankwiseError("x", tuple(x.shape), f"the last dimension is {n}, as the weights have columns")
    codes, bias = _rows(codes), None if bias is None else bias.contiguous()
    return _linear_op(x.reshape(-1, n), codes, scale.contiguous(), bias).view(*x.shape[:-1], m)


def pair(
    x: torch.Tensor, v: tuple[torch.Tensor, torch.Tensor], u: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None, overlap: bool,
) -> torch.Tensor:  # fmt: skip
    """`U (V x) + b` by kernels, `[..., m]`; up to 16 tokens the second one adds up the partial sums of the first.

    Args:
        x: `[..., n]`.
        v: codes and scale of V, `[k, n]`.
        u: of U, `[m, k]`.
        bias: `[m]` or None.
        overlap: let the second kernel start before the first one ends.
    """
    rows = x.reshape(-1, x.shape[-1])
    (k, n), (m, inner) = v[0].shape, u[0].shape
    if not len(rows) or not _takes(rows, FEW) or rows.shape[1] != n or inner != k:
        return product(product(x, *v, None), *u, bias)
    factors = _rows(v[0]), v[1].contiguous(), _rows(u[0]), u[1].contiguous()
    return _pair_op(rows, *factors, None if bias is None else bias.contiguous(), overlap).view(*x.shape[:-1], m)


def _rows(codes: torch.Tensor) -> torch.Tensor:
    return codes if codes.stride(1) == 1 else codes.contiguous()
