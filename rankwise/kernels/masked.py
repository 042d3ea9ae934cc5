"""Masked low-rank linear layer, the form in which ranks are learnt (ARA 2510.19389, LLRC 2512.13733).

In Triton a soft mask, and a prefix whose length only the device knows, run in the products' own epilogues
(`gemm.py`). A promise that is known here becomes slices of the factors, and the library's products.
"""

from math import prod
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from rankwise.kernels.backend import use_triton
from rankwise.kernels.gemm import Epilogue, column_sums, product

Part = slice | torch.Tensor


@torch.library.custom_op("rankwise::masked_forward", mutates_args=())
def masked_forward(
    x: torch.Tensor,
    v: torch.Tensor,
    m: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    rank: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y `[T, m_out]` and `h = x Vᵀ` `[T, k]`, which the backward pass wants; h is arbitrary from `rank` on.

    Args:
        x: `[T, n]`.
        v: `[k, n]`.
        m: `[k]`.
        u: `[m_out, k]`.
        bias: `[m_out]` or None.
        rank: int32 scalar; m counts as 0 from there on.
    """
    h, masked, _ = product(x, v.T, Epilogue(mask=m, rank=rank, columns=True))
    assert h is not None
    assert masked is not None
    y, _, _ = product(masked, u.T, Epilogue(bias=bias, rank=rank, inner=True))
    assert y is not None
    return y, h


@masked_forward.register_fake
def _(x: Any, v: Any, m: Any, u: Any, bias: Any, rank: Any) -> Any:
    return x.new_empty(len(x), len(u)), x.new_empty(len(x), len(v))


@torch.library.custom_op("rankwise::masked_backward", mutates_args=())
def masked_backward(
    g: torch.Tensor,
    h: torch.Tensor,
    v: torch.Tensor,
    m: torch.Tensor,
    u: torch.Tensor,
    rank: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x `[T, n]`, of m (fp32 `[k]`), and of h `[T, k]`: `(g U) ⊙ m`, arbitrary from `rank` on.

    Args:
        g: `[T, m_out]`, the gradient of y.
        h: of the forward pass.
        v: `[k, n]`.
        m: `[k]`.
        u: `[m_out, k]`.
        rank: as in the forward pass.
    """
    _, masked, sums = product(g, u, Epilogue(plain=False, mask=m, other=h, rank=rank, columns=True))
    assert masked is not None
    assert sums is not None
    dx, _, _ = product(masked, v, Epilogue(rank=rank, inner=True))
    assert dx is not None
    return dx, sums, masked


@masked_backward.register_fake
def _(g: Any, h: Any, v: Any, m: Any, u: Any, rank: Any) -> Any:
    return g.new_empty(len(g), v.shape[1]), g.new_empty(len(v), dtype=torch.float32), torch.empty_like(h)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, v, m, u, _, rank = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, output[1], v, m, u, rank)


def _gradients(ctx: Any, g: torch.Tensor | None, _: Any) -> Any:
    if g is None:
        return None, None, None, None, None, None
    x, h, v, m, u, rank = ctx.saved_tensors
    _, wants_v, _, wants_u, wants_bias, _ = ctx.needs_input_grad
    g = g.contiguous()
    dx, dm, dh = masked_backward(g, h, v, m, u, rank)
    dv = _within(dh.T @ x, rank, 0) if wants_v else None
    du = _within(g.T @ (h * m.to(h.dtype)), rank, 1) if wants_u else None
    return dx, dv, dm.to(m.dtype), du, g.sum(0) if wants_bias else None, None


masked_forward.register_autograd(_gradients, setup_context=_remember)


@torch.library.custom_op("rankwise::masked_sums", mutates_args=())
def masked_sums(z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """`column_sums`, as one node of a graph."""
    return column_sums(z, h)


@masked_sums.register_fake
def _(z: Any, h: Any) -> Any:
    return z.new_empty(z.shape[1], dtype=torch.float32)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, v: Any, m: Any, u: Any, bias: Any, keep: Any) -> Any:
        parts = _parts(keep, m)
        z: tuple[torch.Tensor | None, ...]
        if parts is None:
            z = (linear(x, v), None)
            y = linear(z[0] * m.to(x.dtype), u, bias)
        else:
            kept, dropped = parts
            head = linear(x, v[kept])
            z = (head, linear(x, v[dropped]) if ctx.needs_input_grad[2] else None)
            y = linear(head, u[:, kept].contiguous(), bias)
        ctx.keep = keep if isinstance(keep, int) else None
        index = keep if isinstance(keep, torch.Tensor) else None
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, v, m, u, index, *z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, v, m, u, index, head, tail = ctx.saved_tensors
        wants_x, wants_v, wants_m, wants_u, wants_bias, _ = ctx.needs_input_grad
        parts = _parts(ctx.keep if index is None else index, m)
        kept, dropped = (slice(None), None) if parts is None else parts
        h = g @ u
        h_kept = h[..., kept]
        scale = m.to(h.dtype) if parts is None else 1
        dx = (h_kept * scale) @ v[kept] if wants_x else None
        dm = dv = du = None
        if wants_m:
            dm = torch.zeros_like(m)
            dm[kept] = _over_tokens(head, h_kept).to(m.dtype)
            if dropped is not None:
                dm[dropped] = _over_tokens(tail, h[..., dropped]).to(m.dtype)
        if wants_v:
            dv = torch.zeros_like(v)
            dv[kept] = _rows(h_kept * scale).T @ _rows(x)
        if wants_u:
            du = torch.zeros_like(u)
            du[:, kept] = _rows(g).T @ _rows(head * scale)
        return dx, dv, dm, du, _rows(g).sum(0) if wants_bias else None, None


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Any, x: Any, v: Any, m: Any, u: Any) -> Any:
        ctx.save_for_backward(linear(x, v), u)
        ctx.mask_dtype = m.dtype
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        z, u = ctx.saved_tensors
        return g, None, None, _over_tokens(z, g @ u).to(ctx.mask_dtype), None


def masked_matmul(
    x: torch.Tensor,
    v: torch.Tensor,
    m: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None = None,
    keep: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply `y = ((x Vᵀ) ⊙ m) Uᵀ + b` with a mask over the k components of the factors.

    Backward needs `x Vᵀ` alone of what depends on x; x itself is saved only where V is trained. The mask's gradient
    `Σ_tokens (x Vᵀ) ⊙ (g U)` is reduced in fp32 at least, whatever the dtype of the factors.

    Args:
        x: `[..., n]`, floating point.
        v: `[k, n]`, same dtype as `x`.
        m: `[k]`, any floating dtype.
        u: `[m_out, k]`, same dtype as `x`.
        bias: `[m_out]` or None.
        keep: a promise that m is 1 at these components and 0 elsewhere: the first so many, or those of an index
            tensor, each once. The product is then the very arithmetic of `lowrank_linear` with the kept components,
            bit for bit in PyTorch, and m still gets its whole gradient, also where it is 0 (the straight-through
            estimator needs that). An int32 scalar tensor promises less and saves more: m counts as 0 from there on,
            nothing there is computed or gets a gradient, and the host never waits to learn the number.

    fp32 products are exact (IEEE) unless the process allows TF32 (`torch.backends.cuda.matmul`), here as in PyTorch.

    Returns:
        `[..., m_out]`.
    """
    keep = keep.to(x.device) if isinstance(keep, torch.Tensor) else keep  # nothing to do where it belongs there
    rank = keep if isinstance(keep, torch.Tensor) and keep.ndim == 0 else None
    if use_triton(x) and (keep is None or rank is not None):
        row = None if bias is None else bias.contiguous()
        y, _ = masked_forward(_rows(x).contiguous(), v.contiguous(), m.contiguous(), u.contiguous(), row, rank)
        return y.reshape(*x.shape[:-1], len(u))
    if rank is not None:
        m, keep = torch.where(torch.arange(len(m), device=m.device) < rank, m, 0), None
    return _Masked.apply(x, v, m, u, bias, keep)


def mask_probe(y: torch.Tensor, x: torch.Tensor, v: torch.Tensor, m: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return `y = W x` unchanged, and give m the gradient that it has in `masked_matmul` where `W ≈ U V`.

    So a layer that is dense at the moment still learns what each component of its factors is worth.

    Args:
        y: `[..., m_out]`, the dense layer's output.
        x: `[..., n]`, its input; it gets no gradient through the probe.
        v: `[k, n]`, frozen.
        m: `[k]`.
        u: `[m_out, k]`, frozen.

    Returns:
        `[..., m_out]`.
    """
    return _Probe.apply(y, x.detach(), v, m, u)


def _parts(keep: int | torch.Tensor | None, m: torch.Tensor) -> tuple[Part, Part] | None:
    """The kept and the dropped components."""
    if keep is None:
        return None
    if isinstance(keep, int):
        return slice(0, keep), slice(keep, len(m))
    kept = torch.zeros(len(m), dtype=torch.uint8, device=m.device).index_fill(0, keep.long(), 1)
    dropped = kept.argsort(stable=True)[: len(m) - len(keep)]  # nonzero would have the host wait to learn the length
    return keep, dropped


def _over_tokens(z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """`Σ_tokens z ⊙ h`, `[k]`, in fp32 or better."""
    if use_triton(z):
        return masked_sums(_rows(z), _rows(h))
    wide = torch.promote_types(z.dtype, torch.float32)
    return (_rows(z).to(wide) * _rows(h).to(wide)).sum(0)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _within(gradient: torch.Tensor, rank: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Zero from component `rank` on, where memory was never written."""
    if rank is None:
        return gradient
    inside = torch.arange(gradient.shape[dim], device=gradient.device) < rank
    return torch.where(inside if dim else inside[:, None], gradient, 0)
