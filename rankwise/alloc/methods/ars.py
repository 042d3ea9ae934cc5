"""ARS: adaptive rank selection by a hypernetwork that writes the masks (Gao et al., NAACL 2024)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from rankwise.alloc.bank import Bank
from rankwise.alloc.curve import at_most_one
from rankwise.alloc.hypernet import HyperNet
from rankwise.alloc.methods.trained import Task, Trained, check_positive
from rankwise.alloc.objectives import alignment_loss, language_loss, log_ratio_loss
from rankwise.alloc.train import Objective, Recipe, Step


@dataclass(frozen=True)
class Ars(Trained):
    """Train the hypernetwork on `L_CE + λ log(max(R, p) / p) + γ ‖(m - topk(m)) ⊙ σ‖²`, p being the budget.

    The authors: learning rate 1e-3, up to 50,000 samples of 256 tokens in batches of 4 (12,500 steps), temperature
    0.4, λ 16 and γ 1 (Llama-2) or 8 and 2 (Llama-3, Gemma); the compression term is off within 0.002 of the budget.
    Here 400 steps of one sequence. The weights are a network's and not the masks' own: the rate grows with the square
    root of the steps saved, to 5.6e-3. σ is scaled to 1 for each layer's largest.

    Masks may skip components while they are trained; the alignment term draws them to prefixes, and prefixes of as
    many components are what the plan keeps.

    Args:
        start: `full` alone: the network's offset of 3 keeps nearly everything at first.
        train_len: 256 as the authors.
        weight: λ.
        alignment: γ.
        temperature: of the soft masks.
    """

    start: str = "full"
    train_len: int = 256
    weight: float = 16.0
    alignment: float = 1.0
    temperature: float = 0.4

    name: ClassVar[str] = "ars"
    default_sides: ClassVar[str] = "one"
    starts: ClassVar[tuple[str, ...]] = ("full",)
    paper_lr: ClassVar[float] = 1e-3
    paper_steps: ClassVar[int] = 12_500

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("weight", self.weight, above=False)
        check_positive("alignment", self.alignment, above=False)
        check_positive("temperature", self.temperature)

    @property
    def rate(self) -> float:
        """The learning rate in use."""
        return self.paper_lr * math.sqrt(self.paper_steps / self.steps) if self.lr is None else self.lr

    def _recipe(self, **more: Any) -> Recipe:
        return super()._recipe(optimiser="adam", **more)

    def _bank(self, task: Task) -> HyperNet:
        sizes = {name: curve.full_rank for name, curve in task.ledger.curves.items()}
        return HyperNet(sizes, task.seed, temperature=self.temperature)

    def _objective(self, task: Task, bank: Bank | HyperNet) -> Objective:
        values = {name: _singular_values(task.scores.energies[name]) for name in task.ledger.curves}

        def objective(step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            ratio = task.ledger.kept({name: at_most_one(share) for name, share in step.shares.items()})
            apart = [alignment_loss(drawn.mask, values[name].to(drawn.mask)) for name, drawn in step.drawn.items()]
            return ratio, {
                "ce": language_loss(step.logits, step.ids),
                "compression": self.weight * log_ratio_loss(ratio, self.ratio),
                "alignment": self.alignment * torch.stack(apart).mean(),
            }

        return objective


def _singular_values(energy: np.ndarray) -> torch.Tensor:
    """σ `[r]`; all 1 for a layer that the calibration never reached."""
    return torch.from_numpy(np.sqrt(energy) if np.isfinite(energy).all() else np.ones_like(energy))
