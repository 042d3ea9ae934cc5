"""Attention of Llama-3-8B, SmolLM2, Phi-3, Mistral and Gemma shapes, ahead of time."""

from collections.abc import Callable
from typing import Any

import torch

from bench.ahead import ARCHS, COMMON, UNITS, Case
from rankwise.kernels import attention, prefill

BLOCKS, BLOCK_SIZE, CONTEXT = 4096, 16, 4096
COPIES = r"cp\.async"
KERNELS = {"_decode": (r"mma\.sync", COPIES), "_prefill": (UNITS, COPIES)}
NARROW = {"_decode": 3, "_combine": 10, "_prefill": 4}  # block numbers, and what each split says of itself
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def ints(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def caches(kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return meta(BLOCKS, BLOCK_SIZE, kv_heads, dim, dtype=dtype), meta(BLOCKS, BLOCK_SIZE, kv_heads, dim, dtype=dtype)


def decode(seqs: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int, cap: float) -> Any:
    q, table, lens = meta(seqs, heads, dim, dtype=dtype), ints(seqs, CONTEXT // BLOCK_SIZE), ints(seqs)
    return attention._launch(q, *caches(kv_heads, dim, dtype), table, lens, dim**-0.5, window, cap, CONTEXT, 128)


def chunk(seqs: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int, cap: float) -> Any:
    q, table = meta(2048, heads, dim, dtype=dtype), ints(seqs, CONTEXT // BLOCK_SIZE)
    cache = caches(kv_heads, dim, dtype)
    return prefill._launch(q, *cache, table, ints(seqs + 1), ints(seqs), dim**-0.5, window, cap)


def case(call: Callable[..., Any], name: str, archs: tuple[int, ...], *shape: Any) -> Case:
    kernel = "_decode" if call is decode else "_prefill"
    wanted = (COPIES,) if FP32 in shape else KERNELS[kernel]
    return Case(f"{call.__name__}, {name}", lambda: call(*shape), {kernel: wanted}, narrow=NARROW, archs=archs)


SHAPES: list[tuple[Any, ...]] = [
    ("Llama-3-8B, 1 sequence", ARCHS, 1, 32, 8, 128, BF16, 0, 0.0),
    ("Llama-3-8B fp16, 64 sequences", COMMON, 64, 32, 8, 128, FP16, 0, 0.0),
    ("Llama-2-7B, no shared heads", COMMON, 16, 32, 32, 128, BF16, 0, 0.0),
    ("Qwen2-7B, 7 heads share", COMMON, 16, 28, 4, 128, BF16, 0, 0.0),
    ("SmolLM2-135M", ARCHS, 16, 9, 3, 64, BF16, 0, 0.0),
    ("Phi-2, head dimension 80", COMMON, 16, 32, 32, 80, BF16, 0, 0.0),
    ("Phi-3-mini, head dimension 96, window 2047", COMMON, 16, 32, 32, 96, BF16, 2047, 0.0),
    ("Gemma-3-4B, window 1024", ARCHS, 16, 8, 4, 256, BF16, 1024, 0.0),
    ("Gemma-2-9B, soft-cap", COMMON, 16, 16, 8, 256, BF16, 0, 50.0),
    ("Gemma-2-27B, soft-cap, window 4096", ARCHS, 16, 32, 16, 128, BF16, 4096, 50.0),
    ("SmolLM2-135M fp32", COMMON, 16, 9, 3, 64, FP32, 0, 0.0),
    ("Gemma-3-4B fp32, window 1024", COMMON, 16, 8, 4, 256, FP32, 1024, 0.0),
    ("Llama-3-8B fp32", COMMON, 16, 32, 8, 128, FP32, 0, 0.0),
]
CASES = [case(call, *shape) for call in (decode, chunk) for shape in SHAPES]
