"""What share of a layer's parameters k components cost, as a smooth function that masks are trained through."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from rankwise.alloc.budget import Choices

Number = TypeVar("Number", float, torch.Tensor)
Snap = Callable[[float], tuple[int, bool]]  # components wanted -> components kept, and whether the layer is dense


@dataclass(frozen=True)
class Curve:
    """Share of a layer `[m, n]` against its rank k: `k(m+n)/(mn)` (lowrank) or `k(m+n-k)/(mn)` (pivot).

    A pivot layer's share is smooth up to exactly 1 at full rank; a low-rank pair passes 1 at the rank `limit`.
    """

    out_features: int
    in_features: int
    pivot: bool

    @property
    def parameters(self) -> int:
        """m·n."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """min(m, n)."""
        return min(self.out_features, self.in_features)

    @property
    def limit(self) -> float:
        """The rank whose share is 1."""
        return self.full_rank if self.pivot else self.parameters / (self.out_features + self.in_features)

    def share(self, rank: Number) -> Number:
        """Share of the parameters that `rank` components cost; differentiable in `rank`."""
        ends = self.out_features + self.in_features
        return rank * ((ends - rank) if self.pivot else ends) / self.parameters

    def rank(self, share: float) -> float:
        """The rank, not rounded, of a share of at most 1 (lowrank: of any share)."""
        ends = self.out_features + self.in_features
        if not self.pivot:
            return share * self.parameters / ends
        return (ends - max(0.0, ends * ends - 4 * share * self.parameters) ** 0.5) / 2


def nearest(entry: Choices, curve: Curve) -> Snap:
    """To what a layer may become: the choice whose share is nearest to that of the wanted rank.

    Dense is a choice as any other, so a layer turns dense where that is nearer than the largest rank below it, and
    comes back when its rank falls.
    """
    shares = entry.cost / entry.dense_cost

    def snap(rank: float) -> tuple[int, bool]:
        at = int(np.argmin(np.abs(shares - curve.share(rank))))
        return int(entry.rank[at]), entry.kind[at] == "dense"

    return snap


@dataclass(frozen=True)
class Ledger:
    """All layers' parameters while some of them are trained.

    Args:
        curves: layers with a mask.
        fixed: parameters of the layers without one.
    """

    curves: dict[str, Curve]
    fixed: int = 0

    @property
    def total(self) -> int:
        """Parameters of all layers before."""
        return self.fixed + sum(curve.parameters for curve in self.curves.values())

    def kept(self, shares: dict[str, torch.Tensor]) -> torch.Tensor:
        """Parameters kept over all parameters (ARA's R_tot), a scalar; each share counts as at most 1 from outside."""
        parts = [self.curves[name].parameters * share for name, share in shares.items()]
        return (torch.stack(parts).sum() + self.fixed) / self.total


def at_most_one(share: torch.Tensor) -> torch.Tensor:
    """min(share, 1) whose gradient goes on above 1, so that a layer that went past dense can be called back."""
    return share + (share.clamp(max=1.0) - share).detach()
