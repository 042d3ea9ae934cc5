"""Products with 4-bit weights: each format, each way of sharing the work, in the shapes of a 7B, and what they cost."""

from collections.abc import Callable

import torch

import rankwise.kernels.int4
import rankwise.kernels.nf4  # noqa: F401  (both leave their decoders)
from bench.ahead import COMMON, Case
from rankwise.kernels.fourbit import run
from rankwise.kernels.fragments import Fragments, unpack

MMA, LOGIC, PERMUTED = r"mma\.sync", r"lop3[^;]*0xea", "prmt"
INT4, NF4 = {"_linear": (MMA, LOGIC)}, {"_linear": (MMA, PERMUTED)}
LEADS, FOLLOWS = ({"_linear": (MMA, LOGIC, f"griddepcontrol.{what}")} for what in ("launch_dependents", "wait"))
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


def narrow(count: int) -> dict[str, int]:
    """Scales and zero points, two of 16 bits a load."""
    return {"_linear": count}


NF4_ONE = {80: 4.3, 89: 4.3, 90: 4.3, 100: 5.4}  # for 10.0 the assembler copies more registers about

# A round of a thread is U chunks of R tiles: U R 16 · 64 / 32 weights. The budgets are what a round comes to on Hopper,
# the arithmetic of loads, addresses and scales with it; there 4.7 (3.5 on an H200) would be as slow as the memory.
CASES = [
    Case("int4, 128, 1 token", call(dense(128), 1, bias=True), INT4, 128, narrow(4), weights=128, per_weight=2.6),
    Case("int4, 64, 1 token", call(dense(64), 1), INT4, 128, narrow(4), weights=128, per_weight=2.6),
    Case("int4, 32, 1 token", call(dense(32), 1), INT4, 64, narrow(4), weights=64, per_weight=3.3),
    Case("int4, asymmetric", call(dense(128, asymmetric=True), 1), INT4, 128, narrow(8), weights=128, per_weight=2.8),
    Case("int4, 16 tokens", call(dense(128), 16), INT4, 128, narrow(4), weights=128, per_weight=3.0),
    Case("int4, 64 tokens", call(dense(128), 64, partial=True), INT4, 128, narrow(2), weights=64, per_weight=3.6),
    Case("int4, 64 tokens, added up", call(dense(128), 64, bias=True), INT4, 128, narrow(2)),
    Case("nf4, 1 token", call(dense(64, "nf4"), 1), NF4, weights=64, per_weight=NF4_ONE),
    Case("nf4, 16 tokens", call(dense(64, "nf4"), 16), NF4, weights=64, per_weight=4.4),
    Case("nf4, 64 tokens", call(dense(64, "nf4"), 64), NF4, weights=64, per_weight=5.1),
    Case("int4, 11008 wide, 8 tokens", call(weights(11008, 4096, 128), 8), INT4, 128, narrow(4)),
    Case("int4, odd sizes, 1 token", call(weights(4090, 11008, 128), 1), INT4, 128, narrow(4)),
    Case("int4, V of a pair", call(weights(1024, 4096, 128), 1, partial=True), INT4, 128, narrow(4)),
    Case("int4, U of a pair", call(weights(4096, 1024, 128), 1, parts=2), INT4, 128, narrow(2)),
    Case(
        "V leads", call(weights(1024, 4096, 128), 1, partial=True, leads=True), LEADS, 128, narrow(4), archs=(90, 100)
    ),
    Case(
        "U follows", call(weights(4096, 1024, 128), 1, parts=2, follows=True), FOLLOWS, 128, narrow(2), archs=(90, 100)
    ),
    Case("fp16", call(dense(128), 1, torch.float16), INT4, 128, narrow(4), archs=COMMON),
    Case("nf4, fp16", call(dense(64, "nf4"), 1, torch.float16), NF4, archs=COMMON),
    Case("int4, unpacked", lambda: unpack(dense(128, asymmetric=True), BF16), {"_unpack": (LOGIC,)}),
    Case("int4, unpacked, fp32", lambda: unpack(dense(128), torch.float32), archs=COMMON),
    Case("nf4, unpacked", lambda: unpack(dense(64, "nf4"), BF16), {"_unpack": (PERMUTED,)}),
]
