"""Products with a fixed weight on a CPU: the weight is put once into the order that oneDNN's kernels read.

With few tokens that is worth a factor of up to two over a weight in rows, whose blocks are put in order at every call.
Results may differ from those of the weight in rows in their last bit.
"""

import torch
from torch.nn.functional import linear

TOKENS = 16  # oneDNN asks for how many tokens it should choose the order; any number may come
LEAST = 1024  # elements; smaller weights are not worth it


def prepare(weight: torch.Tensor) -> torch.Tensor:
    """The weight `[m, n]` in oneDNN's order, an opaque tensor for `host_linear`; as it is where that is no gain.

    Those are weights on a GPU or in another dtype than bf16, and builds of torch without the operation.
    """
    suits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.numel() >= LEAST
    if not suits or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return weight
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TOKENS)


def host_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x Wᵀ + b` with a weight that `prepare` gave back.

    Args:
        x: `[..., n]`.
        weight: stands for `[m, n]`.
        bias: `[m]` or None.
    """
    if not weight.is_mkldnn:
        return linear(x, weight, bias)
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], weight.shape[0])
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
