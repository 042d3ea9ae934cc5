"""The masked training matmul, forward and backward (T1, T2)."""

from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.work import Contest, Goal, Work
from rankwise.kernels import masked_matmul
from rankwise.kernels.backend import backend

TOLERANCE = 1e-2  # bf16 operands, and a hidden state rounded to bf16 between the products


def works(tokens: int = 4096, wide: int = 4096, rank: int = 2048) -> list[Work]:
    """T1: a soft mask. T2: a prefix of a quarter, whose length only the device knows, against the whole rank."""
    size = f"{tokens} tokens, {wide}x{wide}, rank {rank}"
    traffic = 2 * (4 * tokens * wide + 4 * rank * wide + 4 * tokens * rank)
    flops = 8 * tokens * wide * rank
    soft = (
        Goal("speedup", 1.25, "torch eager"),
        Goal("speedup", 1.05, "torch.compile"),
        Goal("memory", 0.75, "torch eager"),
    )
    quarter = (Goal("speedup", 1 / 0.28, "ours, whole rank"),)
    return [
        Work("T1", f"masked, {size}", _soft(tokens, wide, rank), traffic, flops, soft, cold=False),
        Work(
            "T2",
            f"prefix {rank // 4} of {size}",
            _prefix(tokens, wide, rank),
            traffic // 2,
            flops // 4,
            quarter,
            cold=False,
        ),
    ]


def _inputs(tokens: int, wide: int, rank: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    x, g = (torch.randn(tokens, wide, dtype=torch.bfloat16, device=device) for _ in range(2))
    v = (torch.randn(rank, wide, device=device) / wide**0.5).bfloat16()
    u = (torch.randn(wide, rank, device=device) / rank**0.5).bfloat16()
    return x.requires_grad_(), v, torch.rand(rank, device=device).requires_grad_(), u, g


def _eager(x: torch.Tensor, v: torch.Tensor, m: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return ((x @ v.T) * m.to(x.dtype)) @ u.T


def _step(
    function: Callable[..., torch.Tensor], x: Any, v: Any, m: Any, u: Any, g: Any, **more: Any
) -> Callable[[], Any]:
    """y and the gradients of x and m."""

    def call() -> tuple[torch.Tensor, ...]:
        y = function(x, v, m, u, **more)
        return y.detach(), *torch.autograd.grad(y, (x, m), g)

    return call


def _exact(x: Any, v: Any, m: Any, u: Any, g: Any, rank: int | None = None) -> Callable[[], Any]:
    def call() -> tuple[torch.Tensor, ...]:
        wide = [t.detach().double() for t in (x, v, m, u)]
        if rank is not None:
            wide[2] = wide[2] * (torch.arange(len(m), device=m.device) < rank)
        leaf, mask = wide[0].requires_grad_(), wide[2].requires_grad_()
        y = leaf @ wide[1].T * mask @ wide[3].T
        dx, dm = torch.autograd.grad(y, (leaf, mask), g.double())
        if rank is not None:
            dm = dm * (torch.arange(len(m), device=m.device) < rank)
        return y.detach(), dx, dm

    return call


def _soft(tokens: int, wide: int, rank: int) -> Callable[[torch.device], Contest]:
    def build(device: torch.device) -> Contest:
        x, v, m, u, g = _inputs(tokens, wide, rank, device)
        peers = {"torch eager": _step(_eager, x, v, m, u, g)}
        if device.type == "cuda":
            peers["torch.compile"] = _step(torch.compile(_eager), x, v, m, u, g)
        ours = _step(masked_matmul, x, v, m, u, g)
        return Contest(ours, peers, _exact(x, v, m, u, g), TOLERANCE)

    return build


def _prefix(tokens: int, wide: int, rank: int) -> Callable[[torch.device], Contest]:
    def build(device: torch.device) -> Contest:
        x, v, m, u, g = _inputs(tokens, wide, rank, device)
        quarter, whole = (torch.tensor(r, dtype=torch.int32, device=device) for r in (rank // 4, rank))

        ours = _step(masked_matmul, x, v, m, u, g, keep=quarter)

        def eager() -> Any:
            with backend("torch"):  # the backward pass looks too
                return ours()

        peers = {"ours, whole rank": _step(masked_matmul, x, v, m, u, g, keep=whole), "torch eager": eager}
        return Contest(ours, peers, _exact(x, v, m, u, g, rank // 4), TOLERANCE)

    return build
