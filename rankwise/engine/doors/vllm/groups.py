"""The parts of one of vLLM's layers as what our runtime runs, whole or in the two halves between which ranks add up.

On a CPU a group in bf16 is one call of compiled C, as in the runtime.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rankwise.engine.layers import CompressedLinear, PivotLinear
from rankwise.engine.runtime.mixed import (
    Group,
    Quantised,
    group_of,
    let_go,
    member_of,
    packed_linear,
    quantised_member,
    stored,
)
from rankwise.kernels import Dense, Pivot
from rankwise.kernels.members import Member
from rankwise.kernels.native_linear import Layer, host_group, suits


@dataclass(frozen=True)
class Halves:
    """A lowrank or pivot layer split by its inputs: between its factors ranks add up what they have.

    Args:
        first: V, or the pivots' basis.
        second: U, or the pivots' coefficients.
        index: of a pivot layer.
    """

    first: Group
    second: Group
    index: torch.Tensor | None

    def finish(self, z: torch.Tensor) -> torch.Tensor:
        """From the sum of all ranks' `V x` to the layer's outputs."""
        y = packed_linear(z, self.second)
        return y if self.index is None else torch.cat([z, y], dim=-1).index_select(-1, self.index)


def whole(modules: Sequence[nn.Linear | CompressedLinear]) -> Group:
    """Layers that share an input as one group; the modules' tensors are copied, and empty afterwards."""
    layers = [stored(module) for module in modules]
    if suits(layers, modules[0].weight.dtype) and all(map(_has_its_pivots, modules)):
        group: Group = host_group(layers)
    else:
        group = group_of([_member(module) for module in modules], [None] * len(modules))
    for module in modules:
        let_go(module)
    return group


def halves(module: CompressedLinear) -> Halves:
    """A layer of two factors as two groups; the module is empty afterwards."""
    first, second = (_half(module, name) for name in module.matrices)
    index = module.pivot_index.data.clone() if isinstance(module, PivotLinear) else None
    let_go(module)
    return Halves(first, second, index)


def _half(module: CompressedLinear, name: str) -> Group:
    matrix = module.matrix(name)
    kept = matrix.data if isinstance(matrix, torch.Tensor) else matrix
    layers = [Layer(kept, None, None, None, module.matrices[name][0])]
    if suits(layers, module.weight.dtype):
        return host_group(layers)
    return group_of([Dense(kept) if isinstance(kept, torch.Tensor) else quantised_member(module, [name], None)], [None])


def _has_its_pivots(module: nn.Linear | CompressedLinear) -> bool:
    """Whether each pivot is an output: of a rank's share most may be outputs of other ranks."""
    if not isinstance(module, PivotLinear):
        return True
    return int((module.pivot_index < module.rank).sum()) == module.rank


def _member(module: nn.Linear | CompressedLinear) -> Member | Quantised:
    member = member_of(module)
    return own_pivots(member) if isinstance(member, Pivot) else member


def own_pivots(share: Pivot) -> Pivot | Dense:
    """A rank's share of a pivot layer, in which most pivots may be other ranks' outputs, as a pivot layer of its own.

    The pivots that are outputs here come first among the components, in the order of the outputs. A share that is
    pivots alone is a dense layer.
    """
    rank, index = len(share.basis), share.index.long()
    if len(index) == rank + len(share.coeff):
        return share
    mine = index[index < rank]
    if len(mine) == len(index):
        return Dense(share.basis[mine])
    others = torch.ones(rank, dtype=torch.bool, device=index.device)
    others[mine] = False
    order = torch.cat([mine, others.nonzero()[:, 0]])
    place = torch.empty_like(order)
    place[order] = torch.arange(rank, device=order.device)
    combined = index >= rank
    new = torch.where(combined, index - rank + len(mine), place[index.clamp(max=rank - 1)])
    coeff = share.coeff[: int(combined.sum()), order]
    return Pivot(new.to(torch.int32), share.basis[order], coeff)
