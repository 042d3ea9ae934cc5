"""Products with `int8` weights in the shapes of a 7B, whole and as pairs, and what one token costs."""

from collections.abc import Callable

import torch

from bench.ahead import COMMON, UNITS, Case
from rankwise.kernels.eightbit import run, write_out

MMA, DECODED = r"mma\.sync", r"fma\.rn\.bf16x2"
FEW = {"_linear": (MMA, DECODED, r"cp\.async")}
LEADS, FOLLOWS = ({"_linear": (MMA, f"griddepcontrol.{what}")} for what in ("launch_dependents", "wait"))
BF16 = torch.bfloat16


def weights(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, in rows of whole loads, and scales, on the meta device."""
    codes = torch.empty(m, -(-n // 16) * 16, dtype=torch.int8, device="meta")[:, :n]
    return codes, torch.empty(m, 1, dtype=BF16, device="meta")


def call(
    m: int, n: int, tokens: int, dtype: torch.dtype = BF16, parts: int = 0, bias: bool = False, **how: bool
) -> Callable[[], None]:
    """One product; with parts, of partial sums."""

    def go() -> None:
        size = (parts, tokens, -(-n // 16) * 16) if parts else (tokens, n)
        x = torch.empty(size, dtype=torch.float32 if parts else dtype, device="meta")
        run(x, *weights(m, n), torch.empty(m, dtype=dtype, device="meta") if bias else None, dtype, **how)

    return go


# A round of a thread is 32 · 256 / 64 weights. On an H100 8.8 instructions a weight would be as slow as the memory.
CASES = [
    Case("1 token", call(4096, 4096, 1, bias=True), FEW, weights=128, per_weight=4.5),
    Case("1 token, few rows", call(1024, 4096, 1), FEW),
    Case("fp16", call(4096, 4096, 1, torch.float16), {"_linear": (MMA, r"fma\.rn\.f16x2")}, archs=COMMON),
    Case("64 tokens", call(4096, 4096, 64, bias=True), {"_linear": (UNITS, DECODED, r"cp\.async")}),
    Case("odd sizes, 5 tokens", call(4090, 4090, 5), FEW),
    Case("V of a pair", call(1000, 4096, 1, partial=True, leads=True), LEADS, archs=(90, 100)),
    Case("U of a pair", call(4096, 1000, 1, parts=4), FEW),
    Case("U follows", call(4096, 1000, 16, parts=2, follows=True), FOLLOWS, archs=(90, 100)),
    Case("written out", lambda: write_out(*weights(4096, 4096), BF16), loads=64),
]
