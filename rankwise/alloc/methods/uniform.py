"""Uniform: every layer keeps the same share of its parameters (SVD-LLM 2403.07378 with one-sided factors)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rankwise.alloc.budget import Choices
from rankwise.alloc.methods.base import Method


@dataclass(frozen=True)
class Uniform(Method):
    """The baseline: each layer gets the largest rank that fits its own share; what rounding leaves over goes to
    the layers that rounding hurt the most."""

    name: ClassVar[str] = "uniform"
    default_sides: ClassVar[str] = "one"

    def _pick(self, choices: dict[str, Choices], target: float) -> dict[str, int]:
        share = target / sum(entry.dense_cost for entry in choices.values())
        picked = {name: self._at_most(entry, share) for name, entry in choices.items()}
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
    def _at_most(entry: Choices, share: float) -> int:
        """The largest choice that fits the share, or the smallest of all."""
        return max(0, int(np.searchsorted(entry.cost, share * entry.dense_cost, side="right")) - 1)
