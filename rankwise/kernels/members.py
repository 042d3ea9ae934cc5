"""The kinds of layer that a group is packed from, each as a first factor and what multiplies its result."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Dense:
    """`y = W x`.

    Args:
        weight: `[m, n]`.
    """

    weight: torch.Tensor

    @property
    def first(self) -> torch.Tensor:
        """The stacked factor's part."""
        return self.weight

    @property
    def second(self) -> torch.Tensor:
        """Nothing is left to multiply."""
        return self.weight[:0, :0]

    @property
    def outputs(self) -> int:
        """m."""
        return len(self.weight)


@dataclass(frozen=True)
class LowRank:
    """`y = U V x`.

    Args:
        v: `[k, n]`.
        u: `[m, k]`.
    """

    v: torch.Tensor
    u: torch.Tensor

    @property
    def first(self) -> torch.Tensor:
        """V."""
        return self.v

    @property
    def second(self) -> torch.Tensor:
        """U."""
        return self.u

    @property
    def outputs(self) -> int:
        """m."""
        return len(self.u)


@dataclass(frozen=True)
class Pivot:
    """`y = Pᵀ [I; C] B x`, see `pivot_linear`.

    Args:
        index: `[m]` int32.
        basis: `[k, n]`.
        coeff: `[m - k, k]`.
    """

    index: torch.Tensor
    basis: torch.Tensor
    coeff: torch.Tensor

    @property
    def first(self) -> torch.Tensor:
        """B."""
        return self.basis

    @property
    def second(self) -> torch.Tensor:
        """C."""
        return self.coeff

    @property
    def outputs(self) -> int:
        """m."""
        return len(self.index)


Member = Dense | LowRank | Pivot
