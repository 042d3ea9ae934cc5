"""The arithmetic of one layer. Knows tensors only; importing it needs neither Triton nor a GPU."""

from rankwise.kernels.lowrank import lowrank_linear
from rankwise.kernels.masked import mask_probe, masked_matmul
from rankwise.kernels.pivot import pivot_linear

__all__ = ["lowrank_linear", "mask_probe", "masked_matmul", "pivot_linear"]
