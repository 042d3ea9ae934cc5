"""What a compressed layer is: `nn.Module`s with flat tensor names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rankwise.engine.matrices import Matrix, dense, lowrank, pivot
from rankwise.kernels import NF4, Int4, Int8
from rankwise.kernels.backend import use_triton
from rankwise.kernels.quantized import Ready, Stored, repack
from rankwise.layerspec import LayerSpec

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}  # of the same size, which no cast touches


class CompressedLinear(nn.Module):
    """Common part of the compressed layers.

    `weight` is a one-element guard, never used in the arithmetic. It has the name and not the shape of the dense
    weight: a program that does not know rankwise stops at the shape mismatch instead of running with
    random weights. It also answers code that asks a linear layer for `weight.dtype` or `weight.device`.

    In 16 or 32 bits a matrix is a parameter. In 4 or 8 bits it is the buffers that `storage.Precision.tensors` lists;
    their dtypes are part of the format, and `to(dtype)`, `half()` and the like leave them alone.

    On a GPU matrices in 4 bits are repacked for the kernels at the first use, and then are there twice; `rankwise.LLM`
    keeps them once. Those in 8 bits are copied only where 16 does not divide their columns.
    """

    def __init__(self, spec: LayerSpec, bias: bool, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = spec.in_features, spec.out_features, spec.rank
        self.precision, self.matrices = spec.precision, spec.matrices
        self._dtype, self._device = dtype, device
        self._repacked: dict[str, Ready] = {}
        self.weight = self._tensor(1)
        self.bias = self._tensor(spec.out_features) if bias else None
        for name, shape in self.matrices.items():
            if self.precision.quantised:
                for suffix, stored in self.precision.tensors(*shape).items():
                    empty = torch.zeros(stored.shape, dtype=getattr(torch, stored.dtype), device=device)
                    self.register_buffer(name + suffix, empty)
            else:
                self.register_parameter(name, self._tensor(*shape))

    def _tensor(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=self._dtype, device=self._device), requires_grad=False)

    def matrix(self, name: str) -> torch.Tensor | Stored:
        """A matrix of the layer, as it is stored."""
        if not self.precision.quantised:
            return self.get_parameter(name)
        if self.precision.weights == "int8":
            return Int8(self.get_buffer(f"{name}_int8"), self.get_buffer(f"{name}_scale"))
        if self.precision.weights == "nf4":
            return NF4(self.get_buffer(f"{name}_nf4"), self.get_buffer(f"{name}_absmax"))
        return Int4(
            self.get_buffer(f"{name}_int4"), self.get_buffer(f"{name}_scale"), self._buffers.get(f"{name}_zero")
        )

    def _operand(self, name: str, x: torch.Tensor) -> Matrix:
        """A matrix as it is best multiplied with x."""
        matrix = self.matrix(name)
        wanted = torch.is_grad_enabled() and x.requires_grad  # the kernels give none back
        if isinstance(matrix, torch.Tensor) or wanted or not use_triton(x):
            return matrix
        if name not in self._repacked:
            self._repacked[name] = repack(matrix)
        return self._repacked[name]

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "CompressedLinear":
        """What `to`, `cuda`, `half` and the like do with every tensor; buffers move, and keep their dtype."""
        self._repacked.clear()
        kept = {name: tensor.dtype for name, tensor in self._buffers.items() if tensor is not None}
        for name in kept:
            self._see(name, BITS.get(kept[name], kept[name]))
        try:
            super()._apply(fn, recurse)
        finally:
            for name, dtype in kept.items():
                self._see(name, dtype)
        return self

    def _see(self, name: str, dtype: torch.dtype) -> None:
        tensor = self.get_buffer(name)
        if tensor.dtype != dtype:
            self._buffers[name] = tensor.view(dtype)

    def _load_from_state_dict(self, *args: Any, **more: Any) -> None:
        self._repacked.clear()
        super()._load_from_state_dict(*args, **more)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        stored = f", {self.precision}" if self.precision.quantised else ""
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}{stored}"


class QuantisedLinear(CompressedLinear):
    """`y = W x + b` with `weight_nf4`, `weight_int4` or `weight_int8` and their companions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., n]` to `[..., m]`."""
        return dense(x, self._operand("weight", x), self.bias)


class LowRankLinear(CompressedLinear):
    """`y = U (V x) + b` with `lowrank_u [m, k]` and `lowrank_v [k, n]`."""

    lowrank_u: torch.Tensor
    lowrank_v: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., n]` to `[..., m]`."""
        return lowrank(x, self._operand("lowrank_v", x), self._operand("lowrank_u", x), self.bias)


class PivotLinear(CompressedLinear):
    """`y = Pᵀ [I; C] B x + b` with `pivot_index [m]`, `pivot_basis [k, n]` and `pivot_coeff [m-k, k]`."""

    pivot_index: torch.Tensor
    pivot_basis: torch.Tensor
    pivot_coeff: torch.Tensor

    def __init__(self, spec: LayerSpec, bias: bool, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(spec, bias, dtype, device)
        self.register_buffer("pivot_index", torch.arange(spec.out_features, dtype=torch.int32, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., n]` to `[..., m]`."""
        basis, coeff = self._operand("pivot_basis", x), self._operand("pivot_coeff", x)
        return pivot(x, self.pivot_index, basis, coeff, self.bias)


LAYER_CLASSES: dict[str, type[CompressedLinear]] = {
    "dense": QuantisedLinear,
    "lowrank": LowRankLinear,
    "pivot": PivotLinear,
}


def tensor_shapes(spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Names below the module, and shapes, of the tensors that a layer must have on disk (bias not listed)."""
    guard: dict[str, tuple[int, ...]] = {"weight": (1,)} if spec.recoded else {}
    return guard | {name: stored.shape for name, stored in spec.tensors.items()}


def build_layer(
    spec: LayerSpec, bias: bool, dtype: torch.dtype, device: torch.device | str
) -> CompressedLinear | nn.Linear:
    """An empty layer, to be filled by a loader; an `nn.Linear` if it is dense in 16 or 32 bits.

    Args:
        spec: of a compressed layer.
        bias: it has one.
        dtype: of bias, guard, and of the matrices unless they are stored in 4 or 8 bits.
        device: where it is made.
    """
    if not spec.recoded:
        linear = nn.Linear(spec.in_features, spec.out_features, bias=bias, dtype=dtype, device=device)
        return linear.requires_grad_(False)
    return LAYER_CLASSES[spec.kind](spec, bias, dtype, device)
