"""Global: one Lagrange multiplier over predicted loss against cost, all kinds of all layers competing."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rankwise.alloc.budget import Choices, cost_of, fill, multiplier
from rankwise.alloc.methods.base import Method, Scores
from rankwise.config import check_count


@dataclass(frozen=True)
class Global(Method):
    """Minimise `Σ loss + λ Σ cost`, each layer by itself, and search the λ that meets the budget.

    Each λ gives a point of the lower convex hull of (cost, loss); the budget left below the hull is filled with
    the best steps that fit. Closed form, no training.

    Args:
        channel_multiple: MLPs may lose channels (`alloc.widths`); their widths are multiples of it. 0, or one-sided
            factors: they keep all.
    """

    channel_multiple: int = 0

    name: ClassVar[str] = "global"
    default_sides: ClassVar[str] = "two"
    spends_bytes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("channel_multiple", self.channel_multiple, 0)

    @property
    def width_multiple(self) -> int:
        """As the option says; one-sided losses of different layers cannot be compared."""
        return self.channel_multiple if self.two_sided else 0

    def _pick(self, choices: dict[str, Choices], scores: Scores, target: float) -> dict[str, int]:
        _, price = multiplier(lambda price: cost_of(choices, _minimise(choices, price)), target)
        return fill(choices, _minimise(choices, price), target)


def _minimise(choices: dict[str, Choices], price: float) -> dict[str, int]:
    return {name: int(np.argmin(entry.loss + price * entry.cost)) for name, entry in choices.items()}
