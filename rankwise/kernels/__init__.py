"""The arithmetic of one layer. Knows tensors only; importing it needs neither Triton nor a GPU."""

from rankwise.kernels.backend import backend
from rankwise.kernels.lowrank import lowrank_linear
from rankwise.kernels.masked import mask_probe, masked_matmul
from rankwise.kernels.members import Dense, LowRank, Pivot
from rankwise.kernels.pack import Packed, pack, packed_linear
from rankwise.kernels.pivot import pivot_linear

__all__ = [
    "Dense",
    "LowRank",
    "Packed",
    "Pivot",
    "backend",
    "lowrank_linear",
    "mask_probe",
    "masked_matmul",
    "pack",
    "packed_linear",
    "pivot_linear",
]
