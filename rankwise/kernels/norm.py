"""RMSNorm (Zhang and Sennrich, 1910.07467), alone or after a residual addition, in one pass over the rows."""

import torch

from rankwise.errors import RankwiseError
from rankwise.kernels import native
from rankwise.kernels.backend import cdiv, launch, power_of_two, tl, triton, use_triton


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x, residual, weight, out, summed, rows, inner, x_outer, x_inner, r_outer, r_inner, eps,
    N: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (col < N)[None, :]
    outer, place = row // inner, row % inner
    at = row[:, None] * N + col[None, :]
    y = tl.load(x + (outer * x_outer + place * x_inner)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(residual + (outer * r_outer + place * r_inner)[:, None] + col[None, :], mask=mask, other=0.0)
        total = (y + more.to(tl.float32)).to(summed.dtype.element_ty)
        tl.store(summed + at, total, mask=mask)
        y = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, 1) / N + eps)
    w = tl.load(weight + col, mask=col < N, other=0.0).to(tl.float32)
    if OFFSET:
        w += 1.0
    tl.store(out + at, (y * scale[:, None] * w[None, :]).to(out.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and the sum that was normed (where there is no residual: an empty tensor)."""
    n = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty_like(out) if residual is not None else out.new_empty(0)
    x, inner = _rows(x)
    other = x if residual is None else _rows(residual)[0]
    # Tiles follow from n alone, so a row's result does not depend on how many there are.
    cols = power_of_two(n)
    block = max(1, 512 // cols)
    launch(
        _rms_norm, (cdiv(x.shape[0] * inner, block),), x, other, weight, out, summed, x.shape[0] * inner, inner,
        x.stride(0), x.stride(-2), other.stride(0), other.stride(-2), eps,
        N=n, COLS=cols, ROWS=block, OFFSET=offset, ADD=residual is not None,
        num_warps=min(16, max(1, block * cols // 512)),
    )  # fmt: skip
    return out, summed


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`[outer, n]` or `[outer, inner, n]` with a contiguous last dimension, copied only where it must be."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.ndim != 3 or x.is_contiguous():
        x = x.reshape(-1, x.shape[-1])
    return x, x.shape[1] if x.ndim == 3 else 1


_op = torch.library.custom_op("rankwise::rms_norm", _launch, mutates_args=())


@_op.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else 0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, offset: bool = False) -> torch.Tensor:
    """`x / √(mean(x²) + eps) · w`, computed in fp32 and rounded once.

    Args:
        x: `[..., n]`, floating point. `[tokens, n]` and `[tokens, heads, n]` may be views with any strides but that of
            the last dimension, such as the queries in a packed projection (per-head norm of Qwen3 and Gemma 3).
        weight: `[n]`, any floating dtype, contiguous.
        eps: added to the mean square.
        offset: w is `1 + weight` (Gemma) instead of `weight`.

    Returns:
        `[..., n]` in the dtype of x, contiguous. On a GPU it has no gradient.

    Raises:
        RankwiseError: `weight` is not `[n]`.
    """
    _check(x, weight)
    if native.usable(x, weight):
        return _native(x, None, weight, eps, offset)[0]
    if not use_triton(x):
        return rms_norm_reference(x, weight, eps, offset)
    return _op(x, None, weight, eps, offset)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, offset: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm(x + residual)` and the sum itself, rounded to the dtype of x before it is normed.

    Args:
        x: `[..., n]`, what a block has computed.
        residual: like `x`, the stream that it is added to.
        weight: as for `rms_norm`.
        eps: as for `rms_norm`.
        offset: as for `rms_norm`.

    Returns:
        The norm and the sum, both `[..., n]`, contiguous. On a GPU they have no gradient.

    Raises:
        RankwiseError: `weight` is not `[n]`, or `residual` does not look like `x`.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise RankwiseError("residual", [*residual.shape], f"shape {[*x.shape]} and dtype {x.dtype}, as x has")
    if use_triton(x):
        return _op(x, residual, weight, eps, offset)
    if native.usable(x, residual, weight):
        return _native(x, residual, weight, eps, offset)
    total = x + residual
    return rms_norm_reference(total, weight, eps, offset), total


def _native(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    n = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype)
    summed = out if residual is None else torch.empty_like(out)
    beside = None if residual is None else residual.contiguous()
    x, inner = _rows(x)
    sizes = x.shape[0] * inner, inner, n, x.stride(0), x.stride(-2)
    native.call("norm", out.numel(), x, beside, weight, out, summed, *sizes, eps, float(offset), native.wide(out))
    return out, summed


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, offset: bool = False) -> torch.Tensor:
    """`rms_norm` in plain PyTorch."""
    shape = (x.shape[-1],)
    if weight.dtype == x.dtype and not offset:
        return torch.nn.functional.rms_norm(x, shape, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    w = weight.to(wide) + 1 if offset else weight.to(wide)
    return torch.nn.functional.rms_norm(x.to(wide), shape, w, eps).to(x.dtype)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise RankwiseError("weight", [*weight.shape], f"shape {[*x.shape[-1:]]}, as the last dimension of x")
