"""Groups of linear layers some of which are stored in 4 or 8 bits: the members run one after another.

On a GPU such a matrix runs in the order of the kernels. On a CPU without our functions `int4` in a bf16 model runs by
the product that PyTorch has for it. It has none for `nf4`, none worth using in other dtypes, and `int8` has our
functions alone: there matrices are written out in the model's dtype when they are loaded, once, and have the speed
and the size in memory of dense ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import rms_norm

from rankwise import kernels
from rankwise.engine.layers import CompressedLinear, LowRankLinear, PivotLinear
from rankwise.engine.matrices import dense, dequantised, lowrank
from rankwise.engine.runtime.hostint4 import HostInt4, suits
from rankwise.kernels import Dense, Int4, LowRank, Packed, Pivot, pack
from rankwise.kernels.members import Member
from rankwise.kernels.native_linear import HostGroup, Layer
from rankwise.kernels.pack import prepared
from rankwise.kernels.quantized import Ready as OnGPU
from rankwise.kernels.quantized import Stored, repack
from rankwise.kernels.swiglu import swiglu as gated

Ready = OnGPU | HostInt4  # a matrix in 4 or 8 bits that can be multiplied as it is


@dataclass(frozen=True)
class Quantised:
    """A layer that runs in 4 or 8 bits.

    Args:
        first: W, V or the pivots' basis.
        second: U or the pivots' coefficients; None for a dense layer.
        index: of a pivot layer.
        bias: `[m]` or None.
        outputs: m.
    """

    first: Ready
    second: Ready | None
    index: torch.Tensor | None
    bias: torch.Tensor | None
    outputs: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., n]` to `[..., m]`."""
        if self.second is None:
            return _product(x, self.first, self.bias)
        if self.index is None and not isinstance(self.first, HostInt4) and not isinstance(self.second, HostInt4):
            return lowrank(x, self.first, self.second, self.bias)
        z = _product(x, self.first)
        if self.index is None:
            return _product(z, self.second, self.bias)
        y = torch.cat([z, _product(z, self.second)], dim=-1).index_select(-1, self.index)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Mixed:
    """A group as `packed_linear` runs it, in the place of `kernels.Packed`.

    Args:
        members: in order; those in 16 bits or more as groups of one.
    """

    members: tuple[Quantised | Packed, ...]

    @property
    def place(self) -> None:
        """Outputs come in order: unlike those of `Packed`, pivot layers here may gate, too."""


Group = Packed | Mixed | HostGroup


def group_of(members: Sequence[Member | Quantised], biases: Sequence[torch.Tensor | None]) -> Group:
    """A group for long use; `biases` are those of members that are not quantised."""
    plain = [member for member in members if not isinstance(member, Quantised)]
    if len(plain) == len(members):
        return prepared(pack(plain, biases))
    parts = zip(members, biases, strict=True)
    return Mixed(tuple(m if isinstance(m, Quantised) else prepared(pack([m], [bias])) for m, bias in parts))


def stored(module: nn.Module) -> Layer:
    """A linear module as its tensors lie."""
    bias = module.bias.data if isinstance(module.bias, torch.Tensor) else None
    if not isinstance(module, CompressedLinear):
        assert isinstance(module, nn.Linear)
        return Layer(module.weight.data, None, None, bias, len(module.weight))
    matrices = [m.data if isinstance(m, torch.Tensor) else m for m in map(module.matrix, module.matrices)]
    index = module.pivot_index.data if isinstance(module, PivotLinear) else None
    return Layer(matrices[0], matrices[1] if len(matrices) > 1 else None, index, bias, module.out_features)


def member_of(module: nn.Module) -> Member | Quantised:
    """A linear module as a member of a group."""
    index = module.pivot_index.data if isinstance(module, PivotLinear) else None
    if isinstance(module, CompressedLinear) and module.precision.quantised:
        return quantised_member(module, list(module.matrices), index)
    if isinstance(module, LowRankLinear):
        return LowRank(module.lowrank_v.data, module.lowrank_u.data)
    if isinstance(module, PivotLinear):
        return Pivot(module.pivot_index.data, module.pivot_basis.data, module.pivot_coeff.data)
    assert isinstance(module, nn.Linear)
    return Dense(module.weight.data)


def let_go(module: nn.Module) -> None:
    """Empty a module's own tensors, which were copied."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.data.new_empty(0)


def quantised_member(layer: CompressedLinear, names: Sequence[str], index: torch.Tensor | None) -> Member | Quantised:
    """What runs a layer that is stored in 4 or 8 bits: as it is, or written out.

    Args:
        layer: of `engine.layers`.
        names: of its one or two matrices, the first factor first.
        index: of a pivot layer.
    """
    dtype, bias = layer.weight.dtype, None if layer.bias is None else layer.bias.data
    stored = [layer.matrix(name) for name in names]
    coded = [w for w in stored if not isinstance(w, torch.Tensor)]
    if len(coded) == len(stored) and all(_runs(w, dtype) for w in coded):
        ready = [_ready(w) for w in coded]
        return Quantised(ready[0], ready[1] if len(ready) > 1 else None, index, bias, layer.out_features)
    plain = [dequantised(w, dtype) for w in stored]
    if len(plain) == 1:
        return Dense(*plain)
    return LowRank(*plain) if index is None else Pivot(index, *plain)


def packed_linear(
    x: torch.Tensor,
    group: Group,
    residual: torch.Tensor | None = None,
    *,
    swiglu: bool = False,
    eps: float | None = None,
) -> torch.Tensor:
    """`kernels.packed_linear`, of groups of either sort."""
    if isinstance(group, Packed):
        return kernels.packed_linear(x, group, residual, swiglu=swiglu, eps=eps)
    if eps is not None:
        x = rms_norm(x, x.shape[-1:], eps=eps)
    if isinstance(group, HostGroup):
        y = group(x)
        y = gated(*y.chunk(2, dim=-1)) if swiglu else y
        return y if residual is None else y + residual
    parts = [m(x) if isinstance(m, Quantised) else kernels.packed_linear(x, m) for m in group.members]
    y = gated(*parts) if swiglu else parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return y if residual is None else y + residual


def _runs(w: Stored, dtype: torch.dtype) -> bool:
    return _on_gpu(w) or (isinstance(w, Int4) and suits(w, dtype))


def _on_gpu(w: Stored) -> bool:
    return w.codes.is_cuda


def _ready(w: Stored) -> Ready:
    return HostInt4.of(w) if isinstance(w, Int4) and not _on_gpu(w) else repack(w)


def _product(x: torch.Tensor, w: Ready, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(w, HostInt4):
        return dense(x, w, bias)
    return w(x) if bias is None else w(x) + bias
