"""Groups of layers for a few tokens: both kernels, in the shapes of a 7B."""

from collections.abc import Callable
from typing import Any

import torch

from bench.ahead import COMMON, Case
from rankwise.kernels.pack import alignment, table_of
from rankwise.kernels.packed import run

FOLLOWING = (90, 100)  # other chips start no kernel early
Shapes = tuple[tuple[int, int, int], ...]
Kernels = dict[str, tuple[str, ...]]


def group(shapes: Shapes, tokens: int, dtype: torch.dtype = torch.bfloat16, **more: bool) -> Callable[[], None]:
    """One call with everything that `more` asks for: `place`, `bias`, `residual`, `gated`, `norm`, `pdl`."""

    def call() -> None:
        def meta(*size: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(size, dtype=kind, device="meta")

        total = sum(outputs for outputs, _, _ in shapes)
        outputs = shapes[0][0] if more.get("gated") else total
        first = meta(sum(rank for _, rank, _ in shapes), 4096)
        second = meta(sum(rank * rows for _, rank, rows in shapes))
        place = meta(total, kind=torch.int32) if more.get("place") else None
        bias = meta(total) if more.get("bias") else None
        residual = meta(tokens, outputs) if more.get("residual") else None
        table, gated, eps = table_of(shapes, torch.device("cpu")), more.get("gated", False), more.get("norm")
        everything = first, second, table, place, bias, residual, outputs, alignment(shapes), gated
        run(meta(tokens, 4096), *everything, 1e-5 if eps else None, more.get("pdl", False))

    return call


ONE: Shapes = ((4096, 1024, 4096),)
QKV: Shapes = ((4096, 1024, 4096), (1024, 512, 512), (1024, 1024, 0))  # lowrank, pivot, dense
GATE_UP: Shapes = ((11008, 1024, 11008), (11008, 1536, 11008))
MMA = {"_shrink": (r"mma\.sync", r"cp\.async"), "_expand": (r"mma\.sync", r"cp\.async")}
EARLY = {"_shrink": ("griddepcontrol.launch_dependents",), "_expand": ("griddepcontrol.wait",)}


def case(name: str, call: Callable[[], None], contains: Kernels, other: int, loops: int = 1, **more: Any) -> Case:
    """With `other` narrow loads in the second kernel's other loops, for components that begin at no multiple of 8."""
    return Case(name, call, contains, narrow={"_expand": other}, wide={"_shrink": 1, "_expand": loops}, **more)


CASES = [
    case("one layer, 1 token", group(ONE, 1), {}, 16),
    case("one layer, 16 tokens, residual", group(ONE, 16, residual=True), MMA, 16),
    case("one layer, 64 tokens", group(ONE, 64), MMA, 32),
    case("mixed kinds, 4 tokens, norm, bias", group(QKV, 4, place=True, bias=True, norm=True), MMA, 16),
    case("gate and up, 1 token, norm", group(GATE_UP, 1, gated=True, norm=True), {}, 16, 2),
    case("gate and up, 64 tokens, norm", group(GATE_UP, 64, gated=True, norm=True), MMA, 64, 2),
    case("dependent launch", group(ONE, 1, pdl=True), EARLY, 16, archs=FOLLOWING),
    case("dependent launch, 16 tokens", group(ONE, 16, pdl=True), EARLY, 16, archs=FOLLOWING),
    case("fp16", group(QKV, 16, torch.float16, place=True), MMA, 16, archs=COMMON),
    case("fp32", group(QKV, 1, torch.float32, place=True), {}, 16, archs=COMMON),
    case("ranks that 8 does not divide", group(((4096, 1021, 4096),), 1), {}, 80, 0, loads=16),
]
