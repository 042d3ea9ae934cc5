"""The default: closed-form ranks on two-sided factors, then a refit for the compressed model's own inputs."""

from dataclasses import dataclass
from typing import ClassVar

from rankwise.alloc.methods.lagrange import Global


@dataclass(frozen=True)
class Rankwise(Global):
    """The plan of `global`, channels of MLPs included, and factors that are refitted to it (`alloc.refit`)."""

    channel_multiple: int = 64

    name: ClassVar[str] = "rankwise"
    refits: ClassVar[bool] = True
