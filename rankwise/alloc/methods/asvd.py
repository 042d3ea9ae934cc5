"""ASVD: activation-aware scaling before the decomposition, ranks by STRS (2312.05821)."""

from dataclasses import dataclass
from typing import ClassVar

from rankwise.alloc.methods.strs import Strs


@dataclass(frozen=True)
class Asvd(Strs):
    """ASVD as published: factors in the metric of mean input magnitudes to the power 0.5, low-rank pairs, STRS."""

    kinds: tuple[str, ...] = ("dense", "lowrank")

    name: ClassVar[str] = "asvd"
    default_sides: ClassVar[str] = "diagonal"
