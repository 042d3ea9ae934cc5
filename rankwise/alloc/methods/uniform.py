"""Uniform: every layer keeps the same share of its parameters (SVD-LLM 2403.07378 with one-sided factors)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rankwise.alloc.budget import Choices
from rankwise.alloc.methods.base import Method

HALVINGS = 60  # of the share's range: as fine as a float


@dataclass(frozen=True)
class Uniform(Method):
    """The baseline: each layer gets the largest rank that fits its own share; what rounding leaves over goes to
    the layers that rounding hurt the most."""

    name: ClassVar[str] = "uniform"
    default_sides: ClassVar[str] = "one"

    def _pick(self, choices: dict[str, Choices], target: float) -> dict[str, int]:
        picked = self._at_share(choices, target)
        left = target - sum(int(choices[name].cost[i]) for name, i in picked.items())

        def kept(name: str) -> float:
            return float(choices[name].cost[picked[name]] / choices[name].dense_cost)

        for name in sorted(choices, key=kept):
            cost, at = choices[name].cost, picked[name]
            if at + 1 < len(cost) and (step := int(cost[at + 1] - cost[at])) <= left:
                picked[name] = at + 1
                left -= step
        return picked

    @staticmethod
    def _at_share(choices: dict[str, Choices], target: float) -> dict[str, int]:
        """Each layer's largest choice within one share; the budget's share, unless smallest choices above it cost more.

        A layer whose smallest choice is above the share takes that one, and the others pay: the share is lowered
        until the budget holds.
        """

        def at(share: float) -> dict[str, int]:
            index = {n: np.searchsorted(e.cost, share * e.dense_cost, side="right") for n, e in choices.items()}
            return {name: max(0, int(i) - 1) for name, i in index.items()}

        def fits(picked: dict[str, int]) -> bool:
            return sum(int(choices[name].cost[i]) for name, i in picked.items()) <= target

        low, high = 0.0, target / sum(entry.dense_cost for entry in choices.values())
        if fits(at(high)):
            return at(high)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(at(middle)) else (low, middle)
        return at(low)
