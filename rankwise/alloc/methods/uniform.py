"""Uniform: every layer keeps the same share of its parameters (SVD-LLM 2403.07378 with one-sided factors)."""

from dataclasses import dataclass
from typing import ClassVar

from rankwise.alloc.budget import Choices
from rankwise.alloc.methods.base import Method, Scores
from rankwise.alloc.rescale import proportional


@dataclass(frozen=True)
class Uniform(Method):
    """The baseline: each layer gets the largest rank that fits its own share; what rounding leaves over goes to
    the layers that rounding hurt the most."""

    name: ClassVar[str] = "uniform"
    default_sides: ClassVar[str] = "one"

    def _pick(self, choices: dict[str, Choices], scores: Scores, target: float) -> dict[str, int]:
        return proportional(choices, dict.fromkeys(choices, 1.0), target)
