"""LLRC: learning which components to keep, any of them, by Gumbel-sigmoid masks (2512.13733)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from rankwise.alloc.bank import Bank
from rankwise.alloc.budget import Choices, cost_of, fill
from rankwise.alloc.curve import Curve, at_most_one
from rankwise.alloc.gumbel import GumbelSigmoid, keep_probability
from rankwise.alloc.hypernet import HyperNet
from rankwise.alloc.learnt import Ordered
from rankwise.alloc.methods.trained import Task, Trained, check_positive
from rankwise.alloc.objectives import distillation_loss, oscillating, total_variation
from rankwise.alloc.train import Objective, Recipe, Step
from rankwise.config import check, check_count, check_fraction

SELECTIONS = ("any-k", "top-k")
FASTEST = 0.1  # learning rate of logits, where none is given
HALVINGS = 60  # of the threshold's range: as fine as a float


@dataclass(frozen=True)
class Llrc(Trained):
    """Train one logit a component on `α(t) L_compression + L_distillation + β L_TV`.

    The paper: ASVD's factors, temperature 0.1, Adam at 1e-2, 3,000 documents, stop 750 steps after the ratio is first
    met. Here 600 steps, with rate and rest scaled to them (5e-2 and 150); the rate is at most 0.1, since with a faster
    one momentum carries the logits far past the budget. L_compression is the mean over layers of the mean of the
    logits, as the paper has it: dropped components' logits sink without bound. No cross-entropy.

    Left open by the paper, and decided here: α(t) is a cosine cycle from 0 to `compression`, and 0 in any step whose
    sampled mask is at or below the budget; β is 0.1, L_TV the mean of `|m_{j+1} - m_j|`; the distillation terms are
    relative errors of hidden states (`objectives.distillation_loss`).

    Budget: all layers' logits are cut at one threshold, the lowest whose plan fits; a layer keeps as many components as
    are above it, rounded down to the rank multiple, those of the highest logits. What rounding leaves is spent where
    it saves the most expected components, a layer's worth being `P(W - threshold + g > 0)` summed over what it drops.

    Args:
        steps, start: as in `Trained`; `full` starts at the paper's logits, from 6 down to 3, with all kept.
        rescale: not used.
        selection: `any-k` keeps whichever components learnt the highest logits; `top-k` trains and keeps prefixes.
        temperature: of the soft masks.
        compression: largest α.
        period: steps of one cycle of α; None is a quarter of `steps`.
        distillation: weight of the distillation.
        variation: β.
        after: stop so many steps after the ratio is first met; None is a quarter of `steps`.
        dense_above: a layer whose kept components cost at least this share of it becomes dense again.
    """

    steps: int = 600
    start: str = "full"
    selection: str = "any-k"
    temperature: float = 0.1
    compression: float = 1.0
    period: int | None = None
    distillation: float = 1.0
    variation: float = 0.1
    after: int | None = None
    dense_above: float = 1.0

    name: ClassVar[str] = "llrc"
    default_sides: ClassVar[str] = "diagonal"
    starts: ClassVar[tuple[str, ...]] = ("full", "uniform", "global")
    paper_lr: ClassVar[float] = 1e-2
    paper_steps: ClassVar[int] = 3000

    def __post_init__(self) -> None:
        super().__post_init__()
        check("selection", self.selection, self.selection in SELECTIONS, ", ".join(SELECTIONS))
        check_positive("temperature", self.temperature)
        for name in ("compression", "distillation", "variation"):
            check_positive(name, getattr(self, name), above=False)
        if self.period is not None:
            check_count("period", self.period, 1)
        if self.after is not None:
            check_count("after", self.after, 0)
        check_fraction("dense_above", self.dense_above)

    @property
    def rate(self) -> float:
        """The learning rate in use."""
        return min(FASTEST, super().rate) if self.lr is None else self.lr

    def _recipe(self, **more: Any) -> Recipe:
        after = self.steps // 4 if self.after is None else self.after
        return super()._recipe(optimiser="adam", after=after, taps=True, **more)

    def _bank(self, task: Task) -> Bank:
        masks = {}
        for name, curve in task.ledger.curves.items():
            rank = None if self.start == "full" else task.start[name]
            any_k = self.selection == "any-k"
            masks[name] = GumbelSigmoid(curve.full_rank, rank, temperature=self.temperature, any_k=any_k)
        return Bank(masks)

    def _objective(self, task: Task, bank: Bank | HyperNet) -> Objective:
        logits = [mask.get_parameter("logits") for mask in bank.masks] if isinstance(bank, Bank) else []
        period = max(1, self.steps // 4) if self.period is None else self.period

        def objective(step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            ratio = task.ledger.kept({name: at_most_one(share) for name, share in step.shares.items()})
            pressing = float(ratio.detach()) > self.ratio
            weight = self.compression * oscillating(step.number, period) if pressing else 0.0
            variation = torch.stack([total_variation(drawn.mask) for drawn in step.drawn.values()]).mean()
            return ratio, {
                "compression": weight * torch.stack([values.mean() for values in logits]).mean(),
                "distillation": self.distillation * distillation_loss(step.taps, step.teacher),
                "variation": self.variation * variation,
            }

        return objective

    def _settle(self, task: Task, bank: Bank | HyperNet) -> tuple[dict[str, Choices], dict[str, int]]:
        assert isinstance(bank, Bank)
        logits = {
            name: mask.get_parameter("logits").detach().cpu().double().numpy()
            for name, mask in zip(bank.names, bank.masks, strict=True)
        }
        target = self.ratio * task.ledger.total
        threshold, picked = self._cut(task, logits, target)
        choices = dict(task.choices)
        for name, values in logits.items():
            choices[name] = self._ordered(task.choices[name], values, threshold)
        return choices, fill(choices, picked, target)

    def _cut(self, task: Task, logits: dict[str, np.ndarray], target: float) -> tuple[float, dict[str, int]]:
        """The lowest common threshold whose selection fits the target, and that selection."""

        def at(threshold: float) -> dict[str, int]:
            counts = {name: int((values > threshold).sum()) for name, values in logits.items()}
            return {
                name: self._at_count(entry, task.ledger.curves[name], counts[name]) if name in counts else 0
                for name, entry in task.choices.items()
            }

        low = min(float(values.min()) for values in logits.values()) - 1.0
        high = max(float(values.max()) for values in logits.values()) + 1.0
        if cost_of(task.choices, at(low)) <= target:
            return low, at(low)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if cost_of(task.choices, at(middle)) <= target else (middle, high)
        return high, at(high)

    def _at_count(self, entry: Choices, curve: Curve, count: int) -> int:
        """The index of the choice for so many kept components."""
        if entry.kind[-1] == "dense" and curve.share(float(count)) >= self.dense_above:
            return len(entry.kind) - 1
        factored = [at for at, kind in enumerate(entry.kind) if kind != "dense"]
        return max((at for at in factored if entry.rank[at] <= count), default=factored[0])

    def _ordered(self, entry: Choices, logits: np.ndarray, threshold: float) -> Ordered:
        """A layer's choices with its components in the order of their logits, and what dropping them loses."""
        order = np.argsort(-logits, kind="stable") if self.selection == "any-k" else np.arange(len(logits))
        worth = keep_probability(torch.from_numpy(logits[order] - threshold)).numpy()
        tail = np.concatenate([np.cumsum(worth[::-1])[::-1], [0.0]])
        loss = np.array([0.0 if k == "dense" else tail[r] for k, r in zip(entry.kind, entry.rank, strict=True)])
        changed = replace(entry, loss=loss)
        return Ordered(changed.kind, changed.rank, changed.cost, changed.loss, changed.dense_cost, order)

    def _kept(self, entry: Choices, at: int) -> tuple[int, ...] | None:
        return entry.kept(at) if isinstance(entry, Ordered) else None
