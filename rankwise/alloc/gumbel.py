"""Gumbel-sigmoid masks: one logit a component, any of which may be kept (LLRC 2512.13733, ARS)."""

import torch
from torch import nn

from rankwise.alloc.masks import Drawn, prefix, straight_through

HALVINGS = 60  # of an interval: as fine as a float


class GumbelSigmoid(nn.Module):
    """LLRC's mask: one logit W a component, kept while `sigmoid((W + g) / temperature) > 0.5`, g Gumbel noise.

    Args:
        size: components.
        rank: None starts at the paper's `linspace(6 → 3)`, all kept; a rank starts with as many kept on average.
        temperature: 0.1 in the paper.
        any_k: keep whichever components are above the threshold; else as many of the first.
    """

    def __init__(self, size: int, rank: float | None = None, *, temperature: float = 0.1, any_k: bool = True) -> None:
        super().__init__()
        self.size, self.temperature, self.any_k = size, temperature, any_k
        self.logits = nn.Parameter(torch.linspace(6, 3, size) if rank is None else falling_logits(size, rank))

    def draw(self, noise: torch.Generator) -> Drawn:
        """This step's mask, with noise from the generator."""
        return draw_gumbel(self.logits, self.temperature, noise, any_k=self.any_k)

    def importance(self) -> torch.Tensor:
        """`[size]` probability that a component is kept."""
        return keep_probability(self.logits.detach())

    def rank(self) -> float:
        """Components kept on average."""
        return float(self.importance().sum())


def falling_logits(size: int, rank: float) -> torch.Tensor:
    """Logits `[size]` on a line that falls by 6, at the height where `rank` components are kept on average."""
    line = torch.linspace(3, -3, size, dtype=torch.float64)
    low, high = -40.0, 40.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(keep_probability(line + middle).sum()) < rank else (low, middle)
    return (line + low).float()


def keep_probability(logits: torch.Tensor) -> torch.Tensor:
    """P(W + g > 0) = 1 - exp(-exp(W)) for Gumbel noise g."""
    return -torch.expm1(-logits.clamp(max=30).exp())


def draw_gumbel(logits: torch.Tensor, temperature: float, noise: torch.Generator, *, any_k: bool) -> Drawn:
    """One sample of a Gumbel-sigmoid mask; at least the component of the largest sample is kept.

    Args:
        logits: W `[size]`.
        temperature: of the soft mask.
        noise: generator on the CPU, so that every device draws the same.
        any_k: keep the components above the threshold; else as many of the first.
    """
    uniform = torch.rand(len(logits), generator=noise).clamp_min(1e-20)
    sample = logits + (-torch.log(-torch.log(uniform).clamp_max(-1e-20))).to(logits.device)
    soft = torch.sigmoid(sample / temperature)
    kept = (soft.detach() > 0.5).nonzero()[:, 0]
    kept = kept if len(kept) else sample.detach().argmax()[None]
    if not any_k or len(kept) == len(logits):
        mask = straight_through(prefix(len(logits), len(kept), soft), soft)
        return Drawn(soft, mask, mask.sum(), len(kept))
    hard = torch.zeros_like(soft).index_fill(0, kept, 1.0)
    mask = straight_through(hard, soft)
    return Drawn(soft, mask, mask.sum(), kept)
