"""`int4` weights on a CPU by PyTorch's own product: codes stay in 4 bits, laid out anew once.

Its numbers are `(code - 8) · scale + zero`, ours `(code - point) · scale`: with `zero = (8 - point) · scale` they
are the same. A symmetric group's zero point is 8, so that nothing is rounded; an asymmetric one's `zero` is rounded to
bf16, an error of the size that rounding the weights themselves to bf16 has.
"""

from dataclasses import dataclass

import torch

from rankwise.kernels import Int4
from rankwise.kernels.fragments import split_nibbles

ROWS = 16  # of which the product wants a multiple
MIDDLE = 8  # the code that stands for 0 without a zero point


@dataclass(frozen=True)
class HostInt4:
    """A matrix `[m, n]` for bf16 inputs.

    Args:
        codes: uint8 `[m, n / 2]`, in PyTorch's order.
        scales: bf16 `[n / group, m, 2]`, scale and zero.
        group: columns that share a scale.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group: int

    @classmethod
    def of(cls, w: Int4) -> "HostInt4":
        """Lay a matrix out; it is copied."""
        codes = split_nibbles(w.codes, high_first=False)
        point = MIDDLE if w.zero is None else w.zero.float()
        zero = (MIDDLE - point) * w.scale.float()
        scales = torch.stack([w.scale, zero.bfloat16()], dim=-1).transpose(0, 1).contiguous()
        laid = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return cls(laid, scales, codes.shape[1] // w.scale.shape[1])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x Wᵀ`, `[..., n]` to `[..., m]`, bf16."""
        flat = x.reshape(-1, x.shape[-1])
        if not len(flat):
            return x.new_zeros(*x.shape[:-1], self.scales.shape[1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat.contiguous(), self.codes, self.group, self.scales)
        return y.view(*x.shape[:-1], -1)


def suits(w: Int4, dtype: torch.dtype) -> bool:
    """Whether the product can be had for inputs of a dtype; for others than bf16 it is slower than a dense one."""
    there = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    return there and dtype == torch.bfloat16 and w.codes.device.type == "cpu" and len(w.codes) % ROWS == 0
