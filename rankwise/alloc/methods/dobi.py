"""Dobi-SVD's allocation (ICLR 2025): one trained cut a layer, smoothed by a tanh."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rankwise.alloc.bank import Bank
from rankwise.alloc.curve import at_most_one
from rankwise.alloc.hypernet import HyperNet
from rankwise.alloc.masks import Tanh
from rankwise.alloc.methods.trained import Task, Trained, check_positive
from rankwise.alloc.objectives import language_loss, range_penalty
from rankwise.alloc.train import Objective, Recipe, Step

WIDTH = 4096  # components of the layers that the authors' learning rate was chosen for
FASTEST = 4  # times the authors' rate at most: a cut that jumps far learns nothing on its way
LARGEST = 20.0  # nats a token; exp of more drowns all else


@dataclass(frozen=True)
class Dobi(Trained):
    """The tanh masks of Dobi-SVD alone, on factors of the weights: `exp(L_CE) + 200 |R - R_target| + range`.

    Dobi-SVD decomposes activations on the fly, rebuilds the weights from truncated activations and stores 8-bit
    numbers; none of that is here, so this is its allocation and not its results.

    The authors: Adam at 5 components a step falling to 4 by a half cosine, 20 passes through 256 sequences of 2,048
    tokens. Here γ counts in shares of a layer's components, so that rate is 5/4096 a step for every size, times as much
    as the steps are fewer, at most 4 times: 4.9e-3 at 400 steps. Left open by what is published, and decided here: γ
    starts at the budget's ratio, and the range penalty is how far it lies outside 1 … r.

    Args:
        beta: steepness of the tanh.
        weight: of `|R - R_target|`.
        penalty: weight of the range penalty.
    """

    beta: float = 10.0
    weight: float = 200.0
    penalty: float = 10.0

    name: ClassVar[str] = "dobi-svd"
    default_sides: ClassVar[str] = "one"
    paper_lr: ClassVar[float] = 5 / WIDTH
    paper_steps: ClassVar[int] = 5120

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        check_positive("weight", self.weight, above=False)
        check_positive("penalty", self.penalty, above=False)

    @property
    def rate(self) -> float:
        """The learning rate in use, in shares of a layer's components a step."""
        return self.paper_lr * min(FASTEST, self.paper_steps / self.steps) if self.lr is None else self.lr

    @property
    def shared(self) -> bool:
        """The exponential of a mean over all sequences is no sum of parts."""
        return False

    def _recipe(self, **more: Any) -> Recipe:
        return super()._recipe(optimiser="adam", last_lr=0.8 * self.rate, **more)

    def _bank(self, task: Task) -> Bank:
        curves = task.ledger.curves.items()
        return Bank({name: Tanh(curve.full_rank, task.start[name], beta=self.beta) for name, curve in curves})

    def _objective(self, task: Task, bank: Bank | HyperNet) -> Objective:
        sizes = bank.sizes

        def objective(step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            ratio = task.ledger.kept({name: at_most_one(share) for name, share in step.shares.items()})
            ranks = {name: drawn.rank for name, drawn in step.drawn.items()}
            return ratio, {
                "perplexity": language_loss(step.logits, step.ids).clamp(max=LARGEST).exp(),
                "compression": self.weight * (ratio - self.ratio).abs(),
                "range": self.penalty * range_penalty(ranks, sizes),
            }

        return objective
