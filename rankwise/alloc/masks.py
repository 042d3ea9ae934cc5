"""Masks over a layer's components: what is trained, the soft mask it stands for, and the hard one that is run.

Every parametrisation draws a `Drawn` a step. The forward pass runs the hard mask, the gradient is the soft one's
(straight-through estimator), except for `Tanh`, which runs its soft mask. Here are those that keep the first
components; `gumbel.py` has the one that keeps any.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from rankwise.alloc.curve import Snap

Keep = int | torch.Tensor | None


@dataclass(frozen=True)
class Drawn:
    """One layer's mask in one step.

    Args:
        soft: `[size]` importance of each component, 0..1.
        mask: `[size]` what the forward multiplies by; its gradient goes to the trained parameters.
        rank: scalar, components kept; differentiable.
        keep: where `mask` is 1 (see `kernels.masked_matmul`), or None if it is not hard.
        dense: True if the layer runs as the dense layer that it was.
    """

    soft: torch.Tensor
    mask: torch.Tensor
    rank: torch.Tensor
    keep: Keep
    dense: bool = False


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """The value of `hard`, to the bit, with the gradient of `soft`."""
    return hard + (soft - soft.detach())


def prefix(size: int, rank: int, like: torch.Tensor) -> torch.Tensor:
    """`[size]` mask of the first `rank` components."""
    return (torch.arange(size, device=like.device) < rank).to(like.dtype)


def round_to_rank(rank: float) -> tuple[int, bool]:
    """The nearest whole rank from 1; never dense."""
    return max(1, round(rank)), False


def two_level(share: float, levels: int) -> torch.Tensor:
    """Logits `[levels + 1]` of two values whose mean retention is exactly `share` (ARA, initialisation).

    Candidates `c ≥ share` get `δ = ln[(S_B - share n_B) / (share n_A - S_A)]`, the others 0, with the counts n and the
    sums S of c on either side.

    Args:
        share: above 0 and below 1; the nearest value that fp32 logits can hold is taken.
        levels: D.
    """
    share = min(max(share, 1e-6), 1 - 1e-6)
    candidates = torch.arange(levels, -1, -1, dtype=torch.float64) / levels
    above = candidates >= share
    count, total = int(above.sum()), float(candidates[above].sum())
    others, rest = len(candidates) - count, float(candidates[~above].sum())
    delta = math.log((rest - share * others) / (share * count - total))
    return torch.where(above, delta, 0.0).float()


class Staircase(nn.Module):
    """ARA's mask: a mixture of D + 1 prefixes, monotone, every logit at work on every earlier component.

    With `s = softmax(α)` and candidates `c = 1, …, 0`: retention `q = <c, s>`, soft mask `p = s M`, row i of M being
    ones in the first `⌊size · c_i⌋` places; hard mask `1[j < round(size · q)]`, or what `snap` makes of `size · q`.

    Args:
        size: components (r_max).
        rank: components kept at the start; may lie between two ranks.
        levels: D.
        span: rank that q = 1 stands for in `Drawn.rank`, `size` by default.
        snap: from the wanted number of components to what is run.
    """

    def __init__(
        self, size: int, rank: float, *, levels: int = 100, span: float | None = None, snap: Snap = round_to_rank
    ) -> None:
        super().__init__()
        self.size, self.levels, self.snap = size, levels, snap
        self.span = float(size if span is None else span)
        share = min(max(rank / self.span, 0.05 / size), 1 - 0.05 / size)
        self.alpha = nn.Parameter(two_level(share, levels))
        numerators = torch.arange(levels, -1, -1)
        kept = (size * numerators).div(levels, rounding_mode="floor")  # components that candidate i keeps
        longer = (kept[None, :] > torch.arange(size)[:, None]).sum(1)  # candidates that keep component j
        self.register_buffer("candidates", (numerators / levels).float(), persistent=False)
        self.register_buffer("last", longer - 1, persistent=False)

    def weights(self) -> torch.Tensor:
        """s `[D + 1]`, a point of the simplex."""
        return self.alpha.softmax(0)

    def retention(self) -> torch.Tensor:
        """q, scalar."""
        return torch.dot(self.get_buffer("candidates").to(self.alpha.dtype), self.weights())

    def soft(self) -> torch.Tensor:
        """p `[size]`, never rising."""
        return soft_staircase(self.weights(), self.get_buffer("last"))

    def draw(self, noise: torch.Generator) -> Drawn:
        """This step's mask; nothing is drawn at random."""
        soft, retention = self.soft(), self.retention()
        kept, dense = self.snap(float(retention.detach()) * self.size)
        kept = self.size if dense else min(kept, self.size)
        mask = straight_through(prefix(self.size, kept, soft), soft)
        return Drawn(soft, mask, retention * self.span, kept, dense)

    def importance(self) -> torch.Tensor:
        """p, without gradient."""
        return self.soft().detach()

    def rank(self) -> float:
        """Components that the parameters stand for now, not rounded."""
        return float(self.retention().detach()) * self.span


def soft_staircase(weights: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """`s M` without M: component j has the weight of all candidates up to the last one that keeps it.

    Args:
        weights: s `[D + 1]`, candidates in falling order.
        last: `[size]` index of the last candidate that keeps component j.
    """
    return weights.cumsum(0)[last]


class AbsorbingStaircase(Staircase):
    """The staircase as ARA's authors run it: once a step has found `R ≥ 1`, the layer is dense for ever, and no loss
    moves its logits any more (only what momentum the optimiser still has).

    Args:
        limit: rank at which R is 1.
    """

    def __init__(self, size: int, rank: float, *, limit: float, levels: int = 100, span: float | None = None) -> None:
        super().__init__(size, rank, levels=levels, span=span)
        self.limit = limit
        self.register_buffer("stuck", torch.tensor(False))

    def draw(self, noise: torch.Generator) -> Drawn:
        """The step that first finds `R ≥ 1` still runs as low rank, as in the authors' code."""
        drawn, stuck = super().draw(noise), self.get_buffer("stuck")
        if bool(stuck):
            flat = 0.0 * drawn.rank + max(self.limit, float(drawn.rank.detach()))
            return Drawn(drawn.soft, torch.ones_like(drawn.soft), flat, self.size, dense=True)
        stuck.fill_(float(drawn.rank.detach()) >= self.limit)
        return drawn


class Tanh(nn.Module):
    """Dobi-SVD's mask: `p_i = 0.5 tanh(β (γ - i)) + 0.5` for i = 1 … size; γ alone is trained, and p itself is run.

    What is trained is γ / size, so that one learning rate suits layers of every size.

    Args:
        size: components.
        rank: γ at the start.
        beta: steepness, 10 in the paper; p changes from 0 to 1 within less than one component.
    """

    def __init__(self, size: int, rank: float, *, beta: float = 10.0) -> None:
        super().__init__()
        self.size, self.beta = size, beta
        self.place = nn.Parameter(torch.tensor(rank / size))
        self.register_buffer("number", torch.arange(1.0, size + 1), persistent=False)

    def gamma(self) -> torch.Tensor:
        """γ, scalar, in components."""
        return self.place * self.size

    def draw(self, noise: torch.Generator) -> Drawn:
        """The soft mask; nothing is drawn at random."""
        soft = 0.5 * torch.tanh(self.beta * (self.gamma() - self.get_buffer("number"))) + 0.5
        return Drawn(soft, soft, self.gamma(), None)

    def importance(self) -> torch.Tensor:
        """p, without gradient."""
        return self.draw(torch.Generator()).soft.detach()

    def rank(self) -> float:
        """γ, within 1 and size."""
        return min(max(float(self.gamma().detach()), 1.0), float(self.size))
