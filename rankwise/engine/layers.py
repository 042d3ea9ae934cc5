"""What a compressed layer is: `nn.Module`s with flat tensor names."""

import torch
from torch import nn

from rankwise.kernels import lowrank_linear, pivot_linear
from rankwise.plan import LayerSpec


class CompressedLinear(nn.Module):
    """Common part of the compressed layers.

    `weight` is a one-element guard, never used in the arithmetic. It has the name and not the shape of the dense
    weight: a program that does not know rankwise stops at the shape mismatch instead of running with
    random weights. It also answers code that asks a linear layer for `weight.dtype` or `weight.device`.
    """

    def __init__(self, spec: LayerSpec, bias: bool, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = spec.in_features, spec.out_features, spec.rank
        self._dtype, self._device = dtype, device
        self.weight = self._tensor(1)
        self.bias = self._tensor(spec.out_features) if bias else None

    def _tensor(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=self._dtype, device=self._device), requires_grad=False)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}"


class LowRankLinear(CompressedLinear):
    """`y = U (V x) + b` with `lowrank_u [m, k]` and `lowrank_v [k, n]`."""

    def __init__(self, spec: LayerSpec, bias: bool, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(spec, bias, dtype, device)
        self.lowrank_u = self._tensor(spec.out_features, spec.rank)
        self.lowrank_v = self._tensor(spec.rank, spec.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., n]` to `[..., m]`."""
        return lowrank_linear(x, self.lowrank_v, self.lowrank_u, self.bias)


class PivotLinear(CompressedLinear):
    """`y = Pᵀ [I; C] B x + b` with `pivot_index [m]`, `pivot_basis [k, n]` and `pivot_coeff [m-k, k]`."""

    pivot_index: torch.Tensor

    def __init__(self, spec: LayerSpec, bias: bool, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(spec, bias, dtype, device)
        self.register_buffer("pivot_index", torch.arange(spec.out_features, dtype=torch.int32, device=device))
        self.pivot_basis = self._tensor(spec.rank, spec.in_features)
        self.pivot_coeff = self._tensor(spec.out_features - spec.rank, spec.rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., n]` to `[..., m]`."""
        return pivot_linear(x, self.pivot_index, self.pivot_basis, self.pivot_coeff, self.bias)


LAYER_CLASSES: dict[str, type[CompressedLinear]] = {"lowrank": LowRankLinear, "pivot": PivotLinear}


def tensor_shapes(spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Names below the module, and shapes, of the tensors that a layer must have on disk (bias not listed)."""
    m, n, k = spec.out_features, spec.in_features, spec.rank
    if spec.kind == "lowrank":
        return {"weight": (1,), "lowrank_u": (m, k), "lowrank_v": (k, n)}
    if spec.kind == "pivot":
        return {"weight": (1,), "pivot_index": (m,), "pivot_basis": (k, n), "pivot_coeff": (m - k, k)}
    return {"weight": (m, n)}


def build_layer(spec: LayerSpec, bias: bool, dtype: torch.dtype, device: torch.device | str) -> CompressedLinear:
    """An empty layer of the kind that `spec` names (`lowrank` or `pivot`), to be filled by a loader."""
    return LAYER_CLASSES[spec.kind](spec, bias, dtype, device)
