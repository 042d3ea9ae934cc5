"""Products with 4-bit weights: each format, each way of sharing the work, in the shapes of a 7B, and what they cost."""

from collections.abc import Callable

import torch

import rankwise.kernels.int4
import rankwise.kernels.nf4  # noqa: F401  (both leave their decoders)
from bench.ahead import Case
from rankwise.kernels.fourbit import run
from rankwise.kernels.fragments import Fragments, unpack

MMA = r"mma\.sync"
INT4, NF4 = r"lop3[^;]*0xea", "prmt"
BF16 = torch.bfloat16


def weights(m: int, n: int, group: int, name: str = "int4", asymmetric: bool = False) -> Fragments:
    """On the meta device."""
    tiles, chunk = -(-m // 16), min(group, 64)
    words = torch.empty(tiles, n // chunk, 32, chunk // 16, dtype=torch.int32, device="meta")
    scale = torch.empty(tiles, n // group, 8, 2, dtype=BF16 if name == "int4" else torch.float32, device="meta")
    return Fragments(words, scale, torch.empty_like(scale, dtype=torch.int16) if asymmetric else None, m, group, name)


def call(
    w: Fragments, tokens: int, dtype: torch.dtype = BF16, parts: int = 0, bias: bool = False, **how: bool
) -> Callable[[], None]:
    """One product; with parts, of partial sums."""

    def go() -> None:
        size = (parts, tokens, w.n) if parts else (tokens, w.n)
        x = torch.empty(size, dtype=torch.float32 if parts else dtype, device="meta")
        run(x, w, torch.empty(w.m, dtype=dtype, device="meta") if bias else None, dtype, **how)

    return go


def dense(group: int, name: str = "int4", asymmetric: bool = False) -> Fragments:
    return weights(4096, 4096, group, name, asymmetric)


# A round of a thread is U chunks of R tiles: U R 16 · 64 / 32 weights. The budgets are what a round comes to on Hopper,
# the arithmetic of loads, addresses and scales with it; there 4.7 (3.5 on an H200) would be as slow as the memory.
CASES = [
    Case("int4, 128, 1 token", call(dense(128), 1, bias=True), (MMA, INT4), weights=128, per_weight=2.6, archs=(90,)),
    Case("int4, 64, 1 token", call(dense(64), 1), (MMA, INT4), weights=128, per_weight=2.6, archs=(90,)),
    Case("int4, 32, 1 token", call(dense(32), 1), (MMA, INT4), 64, weights=64, per_weight=3.3, archs=(90,)),
    Case("int4, asymmetric, 1 token", call(dense(128, asymmetric=True), 1), (MMA, INT4), weights=128, per_weight=2.8),
    Case("int4, 16 tokens", call(dense(128), 16), (MMA, INT4), weights=128, per_weight=3.0, archs=(90,)),
    Case("int4, 64 tokens", call(dense(128), 64, partial=True), (MMA, INT4), weights=64, per_weight=3.6, archs=(90,)),
    Case("int4, 64 tokens, added up", call(dense(128), 64, bias=True), (MMA, INT4)),
    Case("nf4, 1 token", call(dense(64, "nf4"), 1), (MMA, NF4), weights=64, per_weight=4.3, archs=(80, 89, 90)),
    Case("nf4, 16 tokens", call(dense(64, "nf4"), 16), (MMA, NF4), archs=(90,)),
    Case("nf4, 64 tokens", call(dense(64, "nf4"), 64), (MMA, NF4), archs=(80, 90)),
    Case("int4, 11008 wide, 8 tokens", call(weights(11008, 4096, 128), 8), (MMA, INT4), archs=(80, 90)),
    Case("int4, odd sizes, 1 token", call(weights(4090, 11008, 128), 1), (MMA, INT4)),
    Case("int4, V of a pair", call(weights(1024, 4096, 128), 1, partial=True), (MMA, INT4)),
    Case("int4, U of a pair", call(weights(4096, 1024, 128), 1, parts=2), (MMA, INT4)),
    Case("V leads", call(weights(1024, 4096, 128), 1, partial=True, leads=True), ("griddepcontrol",), archs=(90,)),
    Case("U follows", call(weights(4096, 1024, 128), 1, parts=2, follows=True), ("griddepcontrol",), archs=(90,)),
    Case("fp16", call(dense(128), 1, torch.float16), (MMA, INT4), archs=(80, 90)),
    Case("nf4, fp16", call(dense(64, "nf4"), 1, torch.float16), (MMA, NF4), archs=(90,)),
    Case("int4, unpacked", lambda: unpack(dense(128, asymmetric=True), BF16), (INT4,)),
    Case("int4, unpacked, fp32", lambda: unpack(dense(128), torch.float32), archs=(80,)),
    Case("nf4, unpacked", lambda: unpack(dense(64, "nf4"), BF16), (NF4,)),
]
