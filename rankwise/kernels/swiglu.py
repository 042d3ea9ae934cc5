"""Gated activations of the feed-forward block (Shazeer, 2002.05202): SwiGLU and GeGLU."""

import torch
from torch.nn.functional import gelu, silu

from rankwise.errors import RankwiseError
from rankwise.kernels import native
from rankwise.kernels.backend import cdiv, launch, tl, triton, use_triton

BLOCK = 1024


@triton.jit
def _gated(gate, up, out, gate_row, up_row, n, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gate + row * gate_row + col, mask=col < n, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_row + col, mask=col < n, other=0.0).to(tl.float32)
    # x (1 + tanh(t)) / 2 = x sigmoid(2t), with 2t = √(8/π) (x + 0.044715 x³)
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x) if GELU else x
    tl.store(out + row * n + col, (x / (1.0 + tl.exp(-z)) * y).to(out.dtype.element_ty), mask=col < n)


def _launch(gate: torch.Tensor, up: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    n = gate.shape[-1]
    # Halves of a packed projection keep their row stride.
    gate, up = (x.reshape(-1, n) if x.stride(-1) == 1 else x.contiguous().view(-1, n) for x in (gate, up))
    launch(
        _gated, (len(gate), cdiv(n, BLOCK)), gate, up, out, gate.stride(0), up.stride(0), n,
        GELU=is_gelu, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


_op = torch.library.custom_op("rankwise::gated_activation", _launch, mutates_args=())
_op.register_fake(lambda gate, up, is_gelu: gate.new_empty(gate.shape))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) · up`, `silu(x) = x / (1 + e^-x)`; in one pass, computed in fp32, on a GPU or in `native.c`.

    Args:
        gate: `[..., n]`, floating point; may be half of a packed projection, `gate, up = packed.chunk(2, -1)`.
        up: like `gate`.

    Returns:
        `[..., n]` in the dtype of gate, contiguous. On a GPU it has no gradient.

    Raises:
        RankwiseError: gate and up differ in shape or dtype.
    """
    _check(gate, up)
    if native.usable(gate, up):
        return _native(gate, up, gelu=False)
    return _op(gate, up, False) if use_triton(gate) else silu(gate) * up


def _native(gate: torch.Tensor, up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype)
    n = gate.shape[-1]
    gate, up = gate.reshape(-1, n), up.reshape(-1, n)
    sizes = len(gate), n, gate.stride(0), up.stride(0)
    native.call("gated", out.numel(), gate, up, out, *sizes, int(gelu), native.wide(out))
    return out


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) · up` with the tanh form of GELU (Hendrycks and Gimpel, 1606.08415), as Gemma has it.

    Args:
        gate: as for `swiglu`.
        up: like `gate`.

    Returns:
        `[..., n]` in the dtype of gate, contiguous. On a GPU it has no gradient.

    Raises:
        RankwiseError: gate and up differ in shape or dtype.
    """
    _check(gate, up)
    if native.usable(gate, up):
        return _native(gate, up, gelu=True)
    return _op(gate, up, True) if use_triton(gate) else gelu(gate, approximate="tanh") * up


def _check(gate: torch.Tensor, up: torch.Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise RankwiseError("up", [*up.shape], f"shape {[*gate.shape]} and dtype {gate.dtype}, as gate has")
