"""The arithmetic of one layer. Knows tensors only; importing it needs neither Triton nor a GPU."""

from rankwise.kernels.lowrank import lowrank_linear
from rankwise.kernels.pivot import pivot_linear

__all__ = ["lowrank_linear", "pivot_linear"]
