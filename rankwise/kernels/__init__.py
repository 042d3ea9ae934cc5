"""The arithmetic of one layer. Knows tensors only; importing it needs neither Triton nor a GPU.

Here are the linear layers; what else a decoder needs lies in `attention`, `prefill`, `norm`, `rotary`, `swiglu` and
`sampling`, the decomposition in `svd`.
"""

from rankwise.kernels.backend import backend
from rankwise.kernels.int4 import Int4, int4_linear, int4_lowrank, quantize_int4, repack_int4
from rankwise.kernels.int8 import Int8, int8_linear, int8_lowrank, quantize_int8
from rankwise.kernels.lowrank import lowrank_linear
from rankwise.kernels.masked import mask_probe, masked_matmul
from rankwise.kernels.members import Dense, LowRank, Pivot
from rankwise.kernels.nf4 import NF4, nf4_linear, nf4_lowrank, quantize_nf4, repack_nf4
from rankwise.kernels.pack import Packed, pack, packed_linear
from rankwise.kernels.pivot import pivot_linear
from rankwise.kernels.quantized import quantized_linear, quantized_lowrank, quantized_pivot

__all__ = [
    "NF4",
    "Dense",
    "Int4",
    "Int8",
    "LowRank",
    "Packed",
    "Pivot",
    "backend",
    "int4_linear",
    "int4_lowrank",
    "int8_linear",
    "int8_lowrank",
    "lowrank_linear",
    "mask_probe",
    "masked_matmul",
    "nf4_linear",
    "nf4_lowrank",
    "pack",
    "packed_linear",
    "pivot_linear",
    "quantize_int4",
    "quantize_int8",
    "quantize_nf4",
    "quantized_linear",
    "quantized_lowrank",
    "quantized_pivot",
    "repack_int4",
    "repack_nf4",
]
