"""STRS: sensitivity-based truncation rank searching, the allocation of ASVD (2312.05821)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from rankwise.alloc.budget import Choices, cost_of
from rankwise.alloc.calibration import Calibration
from rankwise.alloc.methods.base import NEVER_SEEN, Method, Scores
from rankwise.alloc.probes import measure_probes
from rankwise.alloc.rescale import proportional, within
from rankwise.config import check, check_count, check_fraction

Step = tuple[str, int, float]  # a layer, the index of a choice, the loss of the model with that one change


@dataclass(frozen=True)
class Strs(Method):
    """Measure the loss with each layer at each of a few ratios, then cut all of that at one threshold.

    The (layer, ratio, loss) are sorted by loss, highest first; a layer gets the smallest of its ratios behind the cut,
    or stays whole if none is. The cut is the first entry at which the budget is used best without being exceeded
    (binary search). Ratios are a grid, so one factor on all of them then meets the budget exactly.

    A ratio stands for the largest rank that it affords among the kinds allowed: with `pivot` a higher one than the
    paper's. Two deviations save time: a probe runs from its block onward, and the default is 4 windows, not 32.

    Args:
        grid: kept ratios to try, rising, each above 0 and below 1.
        samples: windows a probe is measured on, at most those of the calibration.
    """

    grid: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    samples: int = 4

    name: ClassVar[str] = "strs"
    default_sides: ClassVar[str] = "one"
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("samples", self.samples, 1)
        check("grid", self.grid, isinstance(self.grid, tuple | list) and len(self.grid) > 0, "a list of ratios")
        object.__setattr__(self, "grid", tuple(self.grid))
        for value in self.grid:
            check_fraction("grid", value)
        rising = all(a < b for a, b in zip(self.grid, (*self.grid[1:], 1.0), strict=True))
        check("grid", self.grid, rising, "rising ratios, each below 1")

    def _learn(
        self, choices: dict[str, Choices], scores: Scores, calibration: Calibration
    ) -> tuple[dict[str, Choices], dict[str, int]]:
        tried = {name: self._probed(entry) for name, entry in choices.items()}
        ranks = {name: [int(choices[name].rank[at]) for at in indices] for name, indices in tried.items()}
        probes = measure_probes(calibration, ranks, self.samples, str(self.sides))
        assert probes.dense is not None
        steps = [(n, at, probes.losses[n, int(choices[n].rank[at])]) for n, indices in tried.items() for at in indices]
        target = self.ratio * sum(entry.dense_cost for entry in choices.values())
        kept = cut(choices, steps, target)
        shares = {name: float(choices[name].cost[at] / choices[name].dense_cost) for name, at in kept.items()}
        return _learnt(choices, steps, probes.dense), proportional(choices, shares, target)

    def _probed(self, entry: Choices) -> list[int]:
        """Indices of the choices that the grid stands for, rising; dense is none of them."""
        indices = {within(entry, ratio) for ratio in self.grid}
        return sorted(at for at in indices if entry.kind[at] != "dense")


def cut(choices: dict[str, Choices], steps: list[Step], target: float) -> dict[str, int]:
    """Each layer's smallest choice behind the cut, at the highest total cost that is at most `target`.

    Costs rise as the cut moves towards the lower losses, which is what the binary search rests on. If even all
    steps together cost more than `target`, all are taken.

    Args:
        steps: equal losses keep their order.
    """
    ordered = sorted(steps, key=lambda step: -step[2])

    def behind(first: int) -> dict[str, int]:
        kept = {name: len(entry.cost) - 1 for name, entry in choices.items()}
        for name, at, _ in ordered[first:]:
            kept[name] = min(kept[name], at)
        return kept

    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost_of(choices, behind(middle)) <= target else (low, middle - 1)
    return behind(low)


def _learnt(choices: dict[str, Choices], steps: list[Step], dense: float) -> dict[str, Choices]:
    """The choices with measured increases of the loss in place of predicted ones."""
    measured: dict[str, dict[int, float]] = {name: {} for name in choices}
    for name, at, loss in steps:
        measured[name][at] = min(max(loss - dense, 0.0), NEVER_SEEN)
    return {name: _with_losses(entry, measured[name]) for name, entry in choices.items()}


def _with_losses(entry: Choices, measured: dict[int, float]) -> Choices:
    """Straight lines over cost between measured points, made to fall, down to nothing at dense.

    Below the smallest point the spectrum's prediction goes on from there, scaled to meet it.
    """
    if not measured:
        return entry
    points = sorted(measured)
    falling = np.maximum.accumulate([measured[at] for at in reversed(points)])[::-1]
    loss = np.interp(entry.cost, [*entry.cost[points], entry.dense_cost], [*falling, 0.0])
    first = points[0]
    if entry.loss[first] > 0:
        loss[:first] = falling[0] * entry.loss[:first] / entry.loss[first]
    return replace(entry, loss=loss)
