"""Norms, rotary embedding, gated activations and reductions of logits at production shapes, ahead of time."""

import torch

from bench.ahead import Case
from rankwise.kernels import norm, rotary, sampling, swiglu

BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def normed(tokens: int, n: int, add: bool = False, offset: bool = False, dtype: torch.dtype = BF16) -> None:
    x = meta(tokens, n, dtype=dtype)
    norm._launch(x, x if add else None, meta(n, dtype=dtype), 1e-6, offset)


def heads_normed(tokens: int, heads: int, dim: int) -> None:
    packed = meta(tokens, 2 * heads * dim)
    norm._launch(packed[:, : heads * dim].unflatten(1, (heads, dim)), None, meta(dim), 1e-6, False)


def turned(tokens: int, heads: int, kv_heads: int, dim: int, rotary_dim: int, paged: bool) -> None:
    packed = meta(tokens, heads + 2 * kv_heads, dim)
    q, k, v = packed.split((heads, kv_heads, kv_heads), 1)
    cos, sin, positions = (
        meta(8192, rotary_dim // 2, dtype=FP32),
        meta(8192, rotary_dim // 2, dtype=FP32),
        whole(tokens),
    )
    if paged:
        cache = meta(4096, 16, kv_heads, dim)
        rotary._launch(q, k, v, q, cache, cache, cos, sin, positions, whole(tokens))
    else:
        rotary._launch(q, k, None, meta(*q.shape), meta(*k.shape), None, cos, sin, positions)


def written(tokens: int, kv_heads: int, dim: int) -> None:
    k, cache = meta(tokens, kv_heads, dim), meta(4096, 16, kv_heads, dim)
    rotary._launch(None, k, k, None, cache, cache, slots=whole(tokens))


def whole(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def gated(tokens: int, n: int, is_gelu: bool, dtype: torch.dtype = BF16) -> None:
    gate, up = meta(tokens, 2 * n, dtype=dtype).chunk(2, -1)
    swiglu._launch(gate, up, is_gelu)


CASES = [
    Case("rms norm 1x4096 bf16", lambda: normed(1, 4096)),
    Case("rms norm 4096x4096 fp32", lambda: normed(4096, 4096, dtype=FP32)),
    Case("add and rms norm 64x4096 bf16", lambda: normed(64, 4096, add=True)),
    Case("add and rms norm, 1 + weight, 64x2304 bf16", lambda: normed(64, 2304, add=True, offset=True)),
    Case("add and rms norm 64x16384 bf16", lambda: normed(64, 16384, add=True)),
    Case("rms norm 64x576 bf16", lambda: normed(64, 576)),
    Case("rms norm of 16x32 heads of 128 bf16", lambda: heads_normed(16, 32, 128)),
    Case("rms norm of 16x8 heads of 256 bf16", lambda: heads_normed(16, 8, 256)),
    Case("rotary to cache, Llama-3-8B, 64 tokens", lambda: turned(64, 32, 8, 128, 128, True)),
    Case("rotary to cache, SmolLM2-135M, 16 tokens", lambda: turned(16, 9, 3, 64, 64, True), loads=64),
    Case("rotary to cache, partial 32 of 80, 64 tokens", lambda: turned(64, 32, 32, 80, 32, True), loads=32),
    Case("rotary to cache, Gemma-3-4B, 64 tokens", lambda: turned(64, 8, 4, 256, 256, True)),
    Case("rotary, Llama-3-8B, 4096 tokens", lambda: turned(4096, 32, 8, 128, 128, False)),
    Case("write cache, 64 tokens, 8 heads of 128", lambda: written(64, 8, 128)),
    Case("SwiGLU 64x14336 bf16", lambda: gated(64, 14336, False)),
    Case("SwiGLU 4096x11008 bf16", lambda: gated(4096, 11008, False)),
    Case("SwiGLU 64x1536 fp32", lambda: gated(64, 1536, False, FP32)),
    Case("GeGLU 64x9216 bf16", lambda: gated(64, 9216, True)),
    Case("log-sum-exp and argmax 64x128256 bf16", lambda: sampling._launch(meta(64, 128256)), loads=32),
    Case("log-sum-exp and argmax 1x49152 fp32", lambda: sampling._launch(meta(1, 49152, dtype=FP32)), loads=32),
]
