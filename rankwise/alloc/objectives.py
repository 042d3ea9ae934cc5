"""What masks are trained for: terms of the losses of ARA (2510.19389), LLRC (2512.13733), ARS and Dobi-SVD."""

import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from rankwise.alloc.curve import Curve

FP16_SCALE = 1024.0
GRID = tuple(step / 100 for step in range(1, 100))  # ratios at which G_R is tabulated


def loss_scale(dtype: torch.dtype) -> float:
    """What a loss is multiplied by before its backward pass in a dtype, so that small gradients survive fp16."""
    return FP16_SCALE if dtype == torch.float16 else 1.0


def language_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood, nats a token, of all tokens but each sequence's first.

    Args:
        logits: `[B, T, vocab]`; reduced in fp32.
        ids: `[B, T]`.
    """
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def capacity_table(energy: np.ndarray, curve: Curve) -> np.ndarray:
    """G_R `[99]` at R = 0.01 … 0.99: share of the output's norm kept, `1 - sqrt(Σ_{i>k(R)} σ_i² / Σ σ_i²)` (ARA).

    k(R) is the largest rank that costs at most R. For a layer whose energies are all zero or infinite nothing is
    known, and G_R is 1: no ratio is called a bad deal.
    """
    total = energy.sum()
    if not np.isfinite(total) or total <= 0:
        return np.ones(len(GRID))
    tail = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
    ranks = [min(len(energy), math.floor(curve.rank(ratio) + 1e-9)) for ratio in GRID]
    return 1 - np.sqrt(tail[ranks] / total)


def capacity(table: np.ndarray, ratio: float) -> float:
    """G at the tabulated R nearest to `ratio`."""
    return float(table[min(max(round(ratio * 100), 1), 99) - 1])


def guidance_loss(shares: dict[str, torch.Tensor], tables: dict[str, np.ndarray], modules: int) -> torch.Tensor:
    """ARA's L_g: mean over modules of `(1 - min(R, 1)) · 1[R > G_R]`.

    Where a module spends a larger share of its parameters than it keeps of its output's norm, low rank is a bad
    deal, and the term pushes R up to 1 with a constant slope.

    Args:
        shares: layer to R; layers without a table have no term.
        tables: layer to `capacity_table`.
        modules: over how many modules to take the mean.
    """
    terms = []
    for name, table in tables.items():
        ratio = float(shares[name].detach())
        terms.append((1 - shares[name].clamp(max=1.0)) * (ratio > capacity(table, ratio)))
    return torch.stack(terms).sum() / modules if terms else torch.zeros(())


def squared_compression(ratio: torch.Tensor, target: float) -> torch.Tensor:
    """ARA's L_c: `(R_tot - R_target)²`."""
    return (ratio - target) ** 2


def log_ratio_loss(ratio: torch.Tensor, target: float, tolerance: float = 0.002) -> torch.Tensor:
    """ARS: `log(max(R, p) / p)`, nothing below the target and within `tolerance` above it."""
    return torch.log(ratio / target) if float(ratio.detach()) > target + tolerance else 0.0 * ratio


def alignment_loss(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """ARS: mean squared distance of `m ⊙ σ` from the mask that keeps as many of the first components.

    Args:
        mask: m `[r]`, hard in value.
        values: σ `[r]`, falling; scaled here so that the largest is 1.
    """
    scaled = values / values.max().clamp_min(1e-30)
    first = torch.arange(len(mask), device=mask.device) < mask.detach().sum().round()
    return ((mask - first.to(mask.dtype)) * scaled).square().mean()


def total_variation(mask: torch.Tensor) -> torch.Tensor:
    """LLRC's L_TV: `Σ |m_{j+1} - m_j| / r`, which is least where the kept components lie side by side."""
    return (mask[1:] - mask[:-1]).abs().sum() / len(mask)


def distillation_loss(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """LLRC: distance of hidden states from the dense model's, summed over the taps.

    Each tap counts `‖s - t‖² / ‖t‖²`, token by token, then the mean over tokens: a few tokens have hidden states a
    hundred times larger than all others, and would be all that a plain mean sees.

    Args:
        student: per tap, `[B, T, d]`.
        teacher: likewise, of the dense model.
    """
    terms = []
    for s, t in zip(student, teacher, strict=True):
        error = (s.float() - t.float()).square().sum(-1)
        terms.append((error / t.float().square().sum(-1).clamp_min(1e-12)).mean())
    return torch.stack(terms).sum()


def oscillating(step: int, period: int, low: float = 0.0, high: float = 1.0) -> float:
    """Cosine cycles (Fu et al., NAACL 2019): from `low` up to `high` at half a period, and back."""
    return low + (high - low) * (1 - math.cos(2 * math.pi * step / period)) / 2


def range_penalty(ranks: dict[str, torch.Tensor], sizes: dict[str, int]) -> torch.Tensor:
    """Dobi-SVD: how far ranks lie outside 1 … size, as shares of the size, mean over layers."""
    terms = [((1 - rank).relu() + (rank - sizes[name]).relu()) / sizes[name] for name, rank in ranks.items()]
    return torch.stack(terms).mean()
