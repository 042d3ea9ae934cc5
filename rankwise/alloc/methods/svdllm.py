"""SVD-LLM: whitened factors at a uniform ratio (v1), or at ratios set type by type from theoretical losses (v2)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rankwise.alloc.budget import Choices
from rankwise.alloc.groups import by_type
from rankwise.alloc.methods.base import Method, Scores
from rankwise.alloc.methods.uniform import Uniform
from rankwise.alloc.rescale import proportional, within
from rankwise.config import check_count

LEAST_LOG = 1.0  # of a loss, in nats


@dataclass(frozen=True)
class SvdLlm(Uniform):
    """SVD-LLM v1 (2403.07378) without its fine-tuning: every layer is factored at the same ratio.

    Uniform with the paper's kinds: nothing but low-rank pairs, dense where a pair would be no smaller.
    """

    kinds: tuple[str, ...] = ("dense", "lowrank")

    name: ClassVar[str] = "svd-llm"


@dataclass(frozen=True)
class SvdLlmV2(Method):
    """SVD-LLM V2 (2503.12340), its allocation: within each type of layer, what truncates with less loss gives up more.

    A layer's theoretical loss is `L = ‖W X - (W X)_k‖_F` at the rank k that the target ratio affords, its score
    `1 / log L`, and its removed share `|G| · R · score / Σ_G score`, with R the removed share asked for and G the
    layers of its type in all blocks. Shares above 1 count as 1, and all are then scaled to the budget by one factor.

    Two things the paper leaves open. The logarithm makes the scale of X matter: energies here are means over tokens,
    so `L = √(tokens · Σ_{i>k} energy_i)` with the number of tokens as an option. And `L ≤ 1` has no positive score:
    `log L` counts as at least 1, so that losses below e are all alike and the first to be compressed. A layer that
    the calibration never reached has an infinite loss: it stays as it is while others of its type pay.

    Args:
        tokens: columns of X; by default those of the paper's calibration, 256 sequences of 2048.
    """

    kinds: tuple[str, ...] = ("dense", "lowrank")
    tokens: int = 256 * 2048

    name: ClassVar[str] = "svd-llm-v2"
    default_sides: ClassVar[str] = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("tokens", self.tokens, 1)

    def _pick(self, choices: dict[str, Choices], scores: Scores, target: float) -> dict[str, int]:
        return proportional(choices, self.kept(choices, scores), target)

    def kept(self, choices: dict[str, Choices], scores: Scores) -> dict[str, float]:
        """Layer to the share of its parameters that the paper's formula keeps, before the budget is made exact."""
        shares: dict[str, float] = {}
        for names in by_type(choices).values():
            losses = [self.loss(choices[name], scores.energies[name]) for name in names]
            worth = [1 / max(math.log(max(loss, 1.0)), LEAST_LOG) for loss in losses]
            total = sum(worth)
            removed = [len(names) * (1 - self.ratio) * (w / total if total > 0 else 1 / len(names)) for w in worth]
            shares |= {name: max(1 - share, 0.0) for name, share in zip(names, removed, strict=True)}
        return shares if any(shares.values()) else dict.fromkeys(shares, 1.0)

    def loss(self, entry: Choices, energy: np.ndarray) -> float:
        """`‖W X - (W X)_k‖_F` at the target ratio; infinite where the energies are unknown."""
        at = within(entry, self.ratio)
        tail = 0.0 if entry.kind[at] == "dense" else float(energy[entry.rank[at] :].sum())
        return math.sqrt(self.tokens * tail) if math.isfinite(tail) else math.inf
