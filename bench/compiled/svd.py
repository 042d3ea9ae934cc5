"""One sweep of the block Jacobi kernels: one matrix a program, blocks of rows, single and double precision."""

import torch

from bench.ahead import Case
from rankwise.kernels.jacobi import jacobi_sweep


def _case(batch: int, rows: int, columns: int, half: int, dtype: torch.dtype, meets: tuple[str, ...]) -> Case:
    def call() -> None:
        p = torch.empty(batch, rows, columns + rows, dtype=dtype, device="meta")
        turns = torch.empty(batch, rows // (2 * half), 2 * half, 2 * half, dtype=dtype, device="meta")
        worst = torch.empty(batch, device="meta")
        done = torch.empty(batch, dtype=torch.int32, device="meta")
        jacobi_sweep(p, columns, half, turns, worst, done, 1e-6, 1e-6)

    return Case(
        f"jacobi {batch} x {rows}x{columns} in blocks of {half}, {dtype}".replace("torch.", ""),
        call,
        {"_meet": meets, "_turn": meets[:1]},
    )


FP32, FP64 = (r"fma\.rn(\.ftz)?\.f32", "atom.*max"), (r"(fma\.rn|mma.*)\.f64", "atom.*max")
CASES = [
    _case(64, 32, 64, 16, torch.float32, FP32),
    _case(64, 64, 64, 32, torch.float32, FP32),
    _case(64, 64, 512, 16, torch.float32, FP32),
    _case(64, 128, 512, 32, torch.float32, FP32),
    _case(64, 32, 64, 16, torch.float64, FP64),
    _case(64, 64, 512, 16, torch.float64, FP64),
]
