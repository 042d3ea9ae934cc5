"""The masked layer's products, forward and backward, with and without a rank that only the device knows."""

from collections.abc import Callable

import torch

from bench.ahead import COMMON, UNITS, Case
from rankwise.kernels.gemm import column_sums
from rankwise.kernels.masked import masked_backward, masked_forward


def both(dtype: torch.dtype, tokens: int, *, limited: bool, rank: int = 2048, wide: int = 4096) -> Callable[[], None]:
    """Forward and backward of one layer."""

    def call() -> None:
        x, v, u = (torch.empty(s, dtype=dtype, device="meta") for s in ((tokens, wide), (rank, wide), (wide, rank)))
        m, g = torch.empty(rank, device="meta"), torch.empty(tokens, wide, dtype=dtype, device="meta")
        limit = torch.empty((), dtype=torch.int32, device="meta") if limited else None
        bias = torch.empty(wide, dtype=dtype, device="meta") if limited else None
        _, h = masked_forward._init_fn(x, v, m, u, bias, limit)
        masked_backward._init_fn(g, h, v, m, u, limit)

    return call


def in_tf32(call: Callable[[], None]) -> Callable[[], None]:
    """The same where the process allows TF32."""

    def allowed() -> None:
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            call()
        finally:
            matmul.fp32_precision = before

    return allowed


def sums() -> None:
    """The mask's gradient where the library does the products."""
    tall = torch.empty(4096, 2048, dtype=torch.bfloat16, device="meta")
    column_sums(tall, tall)


WHOLE = {"_product": (UNITS, r"cp\.async")}
TF32 = {arch: unit + r"\S*tf32" for arch, unit in UNITS.items()}
CASES = [
    Case("bf16, 4096 tokens", both(torch.bfloat16, 4096, limited=False), WHOLE),
    Case("bf16, 4096 tokens, rank on the device", both(torch.bfloat16, 4096, limited=True), WHOLE),
    Case("bf16, 64 tokens", both(torch.bfloat16, 64, limited=False), WHOLE),
    Case(
        "bf16, sizes that are no multiples",
        both(torch.bfloat16, 4096, limited=True, rank=2056),
        {"_product": (UNITS,)},
        loads=16,
        narrow={"_product": 32},
        archs=COMMON,
    ),
    Case("fp16, 4096 tokens", both(torch.float16, 4096, limited=False), WHOLE, archs=COMMON),
    Case("fp32, 4096 tokens", both(torch.float32, 4096, limited=True), {"_product": (r"cp\.async",)}, archs=COMMON),
    Case(
        "fp32 by TF32",
        in_tf32(both(torch.float32, 4096, limited=False)),
        {"_product": (TF32, r"cp\.async")},
        narrow={"_product": 16},  # wgmma and tcgen05 want TF32's operands the other way round
        archs=COMMON,
    ),
    Case("column sums", sums),
]
