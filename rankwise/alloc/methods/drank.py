"""D-Rank: ranks by effective rank, in closed form, then some of the queries' and keys' share to the values."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rankwise.alloc.budget import Choices
from rankwise.alloc.groups import by_type
from rankwise.alloc.methods.base import Method, Scores
from rankwise.alloc.rescale import level, proportional
from rankwise.config import check

GIVERS = ("q_proj", "k_proj")
TAKERS = ("v_proj",)
POOLS = ("type", "model")


@dataclass(frozen=True)
class DRank(Method):
    """D-Rank (2509.25622) without basis sharing (n = 1, which the paper uses for grouped-query attention).

    With R the effective rank of a layer's whitened weight and ω = m + n the parameters a unit of rank costs, minimise
    `Σ R / k` under `Σ k ω = T`: `k = T · √(R / ω) / Σ √(R ω)`. No layer gets more than its dense parameters; what that
    frees is shared by the same rule (the optimum of the capped problem). Then a share `beta` of what the queries and
    keys of all blocks got is handed to the values of all blocks in equal parts; what values cannot take goes back in
    proportion. Ranks become parameter ratios `k ω / (m n)`, which one factor scales to the exact budget, so that other
    kinds than `lowrank` buy a higher rank for the same parameters.

    Details that the paper's text was not at hand for follow the authors' published code: one T for each type of layer
    (`pool="type"`; the objective over all layers at once is `"model"`) and beta 0.2 (0.1 for its grouped-query
    models). Its fallback to equal ranks for types named in a list, where those leave less energy behind, is left out.

    Args:
        beta: 0 to below 1; share of the parameters of `q_proj` and `k_proj` that goes to `v_proj`. Models that fuse
            the three are not rebalanced.
        pool: what one T is for: `type` or `model`.
    """

    kinds: tuple[str, ...] = ("dense", "lowrank")
    beta: float = 0.2
    pool: str = "type"

    name: ClassVar[str] = "d-rank"
    default_sides: ClassVar[str] = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        check("beta", self.beta, number and 0 <= self.beta < 1, "from 0 to below 1")
        check("pool", self.pool, self.pool in POOLS, ", ".join(POOLS))

    def _pick(self, choices: dict[str, Choices], scores: Scores, target: float) -> dict[str, int]:
        given = rebalance(self.parameters(scores), {n: float(e.dense_cost) for n, e in choices.items()}, self.beta)
        return proportional(choices, {name: given[name] / entry.dense_cost for name, entry in choices.items()}, target)

    def parameters(self, scores: Scores) -> dict[str, float]:
        """Layer to `k ω`, the parameters that the closed form gives it, k taken as continuous."""
        given: dict[str, float] = {}
        for names in by_type(scores.shapes).values() if self.pool == "type" else [list(scores.shapes)]:
            shapes = {name: scores.shapes[name] for name in names}
            caps = {name: float(m * n) for name, (m, n) in shapes.items()}
            wanted = {n: math.sqrt(effective_rank(scores.energies[n]) * sum(shape)) for n, shape in shapes.items()}
            factor = level(wanted, caps, self.ratio * sum(caps.values()))
            given |= {name: min(factor * wanted[name], caps[name]) for name in names}
        return given


def effective_rank(energy: np.ndarray) -> float:
    """exp of the entropy of `energy / Σ energy`, 1 to r.

    r where the energies are unknown (infinite or NaN), so that the layer asks for the most; 1 where all are zero.
    """
    total = float(energy.sum())
    if not math.isfinite(total):
        return float(len(energy))
    shares = energy / total if total > 0 else np.ones(1)
    shares = shares[shares > 0]  # also without what underflows
    return float(np.exp(-(shares * np.log(shares)).sum()))


def rebalance(given: dict[str, float], caps: dict[str, float], beta: float) -> dict[str, float]:
    """Hand a share `beta` of what queries and keys have to the values, up to their caps; the sum stays the same."""
    gifts = {name: beta * value for name, value in given.items() if name.rpartition(".")[2] in GIVERS}
    takers = [name for name in given if name.rpartition(".")[2] in TAKERS]
    if not takers or not any(gifts.values()):
        return dict(given)
    part = sum(gifts.values()) / len(takers)
    taken = {name: min(part, caps[name] - given[name]) for name in takers}
    used = sum(taken.values()) / sum(gifts.values())
    return {name: value - used * gifts.get(name, 0.0) + taken.get(name, 0.0) for name, value in given.items()}
