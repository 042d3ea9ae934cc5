"""ARA: adaptive rank allocation by staircase masks (2510.19389), as its authors run it and mended."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rankwise.alloc.bank import Bank
from rankwise.alloc.budget import Choices
from rankwise.alloc.curve import Curve, at_most_one, nearest
from rankwise.alloc.gumbel import GumbelSigmoid
from rankwise.alloc.hypernet import HyperNet
from rankwise.alloc.learnt import WHOLE
from rankwise.alloc.masks import AbsorbingStaircase, Staircase
from rankwise.alloc.methods.trained import Task, Trained, check_positive
from rankwise.alloc.objectives import capacity_table, guidance_loss, language_loss, squared_compression
from rankwise.alloc.train import Objective, Recipe, Step
from rankwise.config import check, check_count

PARAMETRISATIONS = ("staircase", "gumbel")
TEMPERATURE = 0.4  # of Gumbel masks


@dataclass(frozen=True)
class Ara(Trained):
    """Train one staircase mask a layer on `L_CE + λ1 (R_tot - R_target)² + λ2 L_g`, then rescale to the budget.

    The paper: AdamW at 1e-3 without weight decay, 2,560 steps of one sequence of 512 tokens (10 passes through 256);
    with the default of 400 steps the rate is 6.4e-3.

    What is mended, against the authors' code (`faithful` keeps every one of these):

    * R is worked out anew each step, and a dense layer comes back when its R falls: it runs dense, while its mask
      gets the gradient that it has with all components kept (`kernels.mask_probe`), and R's own gradient goes on
      above 1. In the authors' code R ≥ 1 is never left again.
    * The forward runs what could be deployed: the choice (kind, rank multiple, no larger than dense) whose share is
      nearest to R. So training and plan differ by the last rescaling alone.
    * With `pivot` among the kinds, `R = k(m+n-k)/(mn)` is smooth up to 1 at full rank, masks cover all components
      (ρ is not needed) and there is no jump to dense. The guidance loss is about that jump, and left out then.
    * The budget is exact.

    Args:
        faithful: the authors' own: one-sided factors, low rank or dense, ranks of any number, round in training, dense
            for ever from R ≥ 1, at the end dense from R = 0.99, one factor on the other layers' ranks, floor. The
            budget may be missed, and `sides`, `kinds`, `rank_multiple` are set to match (a rank that the factor would
            carry past dense stops below it). `rescale` has no meaning then.
        parametrisation: `staircase`, or `gumbel` to compare: a Gumbel-sigmoid prefix of as many components.
        rho: masks of low-rank layers reach to this share, above 1.
        levels: D, the staircase has D + 1 candidates.
        lambda1: weight of the squared distance from the budget.
        lambda2: weight of the guidance loss.
    """

    faithful: bool = False
    parametrisation: str = "staircase"
    rho: float = 1.2
    levels: int = 100
    lambda1: float = 100.0
    lambda2: float = 50.0

    name: ClassVar[str] = "ara"
    paper_lr: ClassVar[float] = 1e-3
    paper_steps: ClassVar[int] = 2560

    def __post_init__(self) -> None:
        check("faithful", self.faithful, isinstance(self.faithful, bool), "True, False")
        check("parametrisation", self.parametrisation, self.parametrisation in PARAMETRISATIONS, "staircase, gumbel")
        if self.faithful:
            check("parametrisation", self.parametrisation, self.parametrisation == "staircase", "staircase (faithful)")
            forced = {"kinds": ("dense", "lowrank"), "rank_multiple": 1, "sides": self.sides or "one"}
            for name, value in forced.items():
                object.__setattr__(self, name, value)
        super().__post_init__()
        check_positive("rho", self.rho, 1.0)
        check_count("levels", self.levels, 1)
        check_positive("lambda1", self.lambda1, above=False)
        check_positive("lambda2", self.lambda2, above=False)

    @property
    def exact(self) -> bool:
        """The authors' rescaling may miss the budget."""
        return not self.faithful

    def _recipe(self, **more: Any) -> Recipe:
        return super()._recipe(probe=not self.faithful, dense="dense" in self.kinds, **more)

    def _bank(self, task: Task) -> Bank:
        return Bank({name: self._mask(name, curve, task) for name, curve in task.ledger.curves.items()})

    def _mask(self, name: str, curve: Curve, task: Task) -> Any:
        entry, start = task.choices[name], task.start[name]
        size = curve.full_rank if curve.pivot else min(curve.full_rank, math.floor(self.rho * curve.limit))
        if "dense" not in entry.kind:
            size = int(entry.rank[-1])
        if self.parametrisation == "gumbel":
            return GumbelSigmoid(size, start, temperature=TEMPERATURE, any_k=False)
        if self.faithful:
            span = min(float(curve.full_rank), self.rho * curve.limit)
            return AbsorbingStaircase(size, start, limit=curve.limit, levels=self.levels, span=span)
        return Staircase(size, start, levels=self.levels, snap=nearest(entry, curve))

    def _objective(self, task: Task, bank: Bank | HyperNet) -> Objective:
        ledger, modules = task.ledger, len(task.choices)
        jumping = {n: c for n, c in ledger.curves.items() if not c.pivot and "dense" in task.choices[n].kind}
        tables = {name: capacity_table(task.scores.energies[name], curve) for name, curve in jumping.items()}

        def objective(step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            bounded = {n: s.clamp(max=1.0) if self.faithful else at_most_one(s) for n, s in step.shares.items()}
            ratio = ledger.kept(bounded)
            terms = {"ce": language_loss(step.logits, step.ids)}
            terms["compression"] = self.lambda1 * squared_compression(ratio, self.ratio)
            if tables:
                terms["guidance"] = self.lambda2 * guidance_loss(step.shares, tables, modules)
            return ratio, terms

        return objective

    def _settle(self, task: Task, bank: Bank | HyperNet) -> tuple[dict[str, Choices], dict[str, int]]:
        if not self.faithful:
            return super()._settle(task, bank)
        shares = {name: task.ledger.curves[name].share(rank) for name, rank in bank.ranks().items()}
        factor = _factor(task, shares, self.ratio)
        picked = {name: len(entry.kind) - 1 for name, entry in task.choices.items()}
        for name, share in shares.items():
            if share < WHOLE:
                rank = max(1, math.floor(factor * task.ledger.curves[name].rank(share)))
                picked[name] = _largest(task.choices[name], rank)
        return task.choices, picked


def _factor(task: Task, shares: dict[str, float], ratio: float) -> float:
    """`1 - (R_tot - R_target) Σ N / Σ_C N R` over the set C of the layers that do not become dense."""
    counts = {name: task.ledger.curves[name].parameters for name in shares}
    kept = task.ledger.fixed + sum(counts[name] * min(share, 1.0) for name, share in shares.items())
    rest = sum(counts[name] * share for name, share in shares.items() if share < WHOLE)
    return 1 - (kept - ratio * task.ledger.total) / rest if rest else 1.0


def _largest(entry: Choices, rank: int) -> int:
    """The index of the largest factored choice of at most `rank`, or of the smallest one."""
    factored = [at for at, kind in enumerate(entry.kind) if kind != "dense"]
    return max((at for at in factored if entry.rank[at] <= rank), default=factored[0])
