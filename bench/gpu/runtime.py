"""Norms, rotary embedding, gated activations and reductions of logits against PyTorch, eager and compiled."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.nn.functional import silu

from bench.gpu.work import Call, Contest, Goal, Work
from rankwise.kernels.norm import add_rms_norm
from rankwise.kernels.rotary import rotary_to_cache_
from rankwise.kernels.sampling import logsumexp_argmax
from rankwise.kernels.swiglu import swiglu

BF16 = torch.bfloat16
TOLERANCE = {torch.bfloat16: 3 * 2**-9, torch.float16: 3 * 2**-12, torch.float32: 1e-5}
EPS, BLOCK = 1e-5, 16
Pair = tuple[torch.Tensor, torch.Tensor]


def norm(tokens: int, n: int, device: torch.device, dtype: torch.dtype = BF16) -> Contest:
    """Residual addition and RMSNorm."""
    x, residual, weight = (torch.randn(*s, device=device, dtype=dtype) for s in ((tokens, n), (tokens, n), (n,)))

    def reference() -> Pair:
        total = (x + residual).double()
        return torch_rms_norm(total, (n,), weight.double(), EPS), total

    ours = partial(add_rms_norm, x, residual, weight, EPS)
    return Contest(ours, _peers(_add_norm, x, residual, weight), reference, TOLERANCE[dtype])


def gated(tokens: int, n: int, device: torch.device, dtype: torch.dtype = BF16) -> Contest:
    """SwiGLU of the halves of a packed projection."""
    gate, up = torch.randn(tokens, 2 * n, device=device, dtype=dtype).chunk(2, -1)
    ours, exact = partial(swiglu, gate, up), lambda: _gate(gate.double(), up.double())
    return Contest(ours, _peers(_gate, gate, up), exact, TOLERANCE[dtype])


def turned(
    tokens: int, heads: int, kv_heads: int, dim: int, device: torch.device, dtype: torch.dtype = BF16
) -> Contest:
    """Rotary embedding of q and k of a packed projection, k and v into pages.

    All give q and the pages. Ours turns q in place, so it copies q first: else each call would turn it on.
    """
    packed = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device, dtype=dtype)
    q, k, v = packed.split((heads, kv_heads, kv_heads), 1)
    angles = torch.rand(4096, dim // 2, device=device) * 6
    cos, sin, positions = angles.cos(), angles.sin(), torch.randint(4096, (tokens,), device=device)
    blocks = -(-tokens // BLOCK)
    slots = torch.randperm(blocks * BLOCK, device=device)[:tokens]
    caches = torch.zeros(2, blocks, BLOCK, kv_heads, dim, device=device, dtype=dtype)

    def ours() -> Pair:
        mine = q.clone()
        rotary_to_cache_(mine, k, v, cos, sin, positions, caches[0], caches[1], slots)
        return mine, caches

    def reference() -> Pair:
        wide = (x.double() for x in (q, k, v, cos, sin))
        return _turn_and_write(*wide, positions, slots, torch.zeros_like(caches, dtype=torch.float64))

    peers = _peers(_turn_and_write, q, k, v, cos, sin, positions, slots, caches)
    return Contest(ours, peers, reference, TOLERANCE[dtype])


def logits(rows: int, vocabulary: int, device: torch.device, dtype: torch.dtype = BF16) -> Contest:
    """Log-sum-exp and place of the largest logit of each row."""
    x = 3 * torch.randn(rows, vocabulary, device=device, dtype=dtype)
    ours, exact = partial(logsumexp_argmax, x), lambda: (x.double().logsumexp(-1), x.double().argmax(-1))
    return Contest(ours, _peers(_reduce, x), exact, 1e-5)


def _add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Pair:
    total = x + residual
    return torch_rms_norm(total, weight.shape, weight, EPS), total


def _gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate) * up


def _turn_and_write(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    slots: torch.Tensor, caches: torch.Tensor,
) -> Pair:  # fmt: skip
    c, s = cos[positions][:, None], sin[positions][:, None]
    caches.view(2, -1, *k.shape[1:])[0, slots] = _turn(k, c, s)
    caches.view(2, -1, *k.shape[1:])[1, slots] = v
    return _turn(q, c, s), caches


def _turn(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    a, b = x.to(c.dtype).chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)


def _reduce(x: torch.Tensor) -> Pair:
    return x.float().logsumexp(-1), x.argmax(-1)


def _peers(plain: Callable[..., Any], *arguments: torch.Tensor) -> dict[str, Call]:
    return {"torch eager": partial(plain, *arguments), "torch.compile": partial(_compiled(plain), *arguments)}


@lru_cache
def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for all sets of inputs: compiled again for each shape, never for each set."""
    return torch.compile(plain, dynamic=False)


def works() -> list[Work]:
    """Sizes of Llama-3-8B at 1, 64 and 4096 tokens, and its logits at 1 and 64 rows."""
    goals = (Goal("speedup", 1.0, "torch eager"), Goal("speedup", 1.0, "torch.compile"))
    lines = []
    for tokens in (1, 64, 4096):
        norms, gates, turns = tokens * 4096 * 4 * 2, tokens * 14336 * 3 * 2, tokens * (32 * 4 + 8 * 4) * 128 * 2
        name = f"rotary and cache write, {tokens} tokens, 32/8 heads of 128, bf16, with a copy of q"
        lines += [
            Work("R1", f"add and RMSNorm, {tokens} x 4096, bf16", partial(norm, tokens, 4096), norms, goals=goals),
            Work("R2", f"SwiGLU, {tokens} x 14336, bf16", partial(gated, tokens, 14336), gates, goals=goals),
            Work("R3", name, partial(turned, tokens, 32, 8, 128), turns, goals=goals),
        ]
    for rows in (1, 64):
        name = f"log-sum-exp and argmax, {rows} x 128256, bf16"
        lines.append(Work("R4", name, partial(logits, rows, 128256), rows * 128256 * 2, goals=goals))
    return lines
