"""Widths of MLPs under a budget of bytes: against ranks and precisions, which compete for the same bytes.

What rounding costs is tabulated for layers as they are. At a smaller width it is taken to be less by as much as the
layer's energy in the metric: what has gone is what counted least. Formats that fit the smaller width alone are not
looked at, and what is lost with channels counts as what is lost with ranks. Ranks and precisions are chosen once more,
by spectra and a table of the layers that are left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rankwise.alloc.budget import Choices
from rankwise.alloc.joint import Trust, allowed, stored_choices
from rankwise.alloc.methods.base import Method, Scores
from rankwise.alloc.precisions import RoundingTable
from rankwise.alloc.widths import WidthBudget
from rankwise.storage import Precision

Shape = tuple[int, int]


@dataclass(frozen=True)
class _Narrow:
    """Scores of one layer at some width."""

    shapes: dict[str, Shape]
    energies: dict[str, np.ndarray]
    originals: dict[str, Shape]
    removed: dict[str, float] = field(default_factory=dict)


class _Part(RoundingTable):
    """A share of what a table says."""

    def __init__(self, table: RoundingTable, share: float) -> None:
        super().__init__(table.layers, table.ratios)
        self.share = share

    def loss(self, name: str, kind: str, ranks: np.ndarray, precision: Precision) -> np.ndarray:
        return self.share * super().loss(name, kind, ranks, precision)


def byte_budget(
    method: Method,
    scores: Scores,
    table: RoundingTable,
    precisions: Sequence[Precision],
    target: int,
    dtype: str,
) -> WidthBudget:
    """The budget of `alloc.joint.joint_plan`, for `alloc.widths`.

    Args:
        method: see `joint_plan`.
        scores: shapes and two-sided spectra of layers that have all their channels.
        table: what rounding adds to these.
        precisions: to choose from.
        target: bytes of all linear layers.
        dtype: the model's own.
    """

    def choose(name: str, shape: Shape, energy: np.ndarray) -> Choices:
        narrow = _Narrow({name: shape}, {name: energy}, {name: scores.shapes[name]})
        part = _Part(table, _share(energy, scores.energies[name]))
        options = [pair for pair in allowed(method, name, precisions, dtype) if table.knows(name, *pair)]
        return stored_choices(method, name, narrow, part, options, Trust())

    identity = {"target": target, "precisions": [str(precision) for precision in precisions]}
    return WidthBudget(choose, Trust().rank, target, 0.0, identity)


def _share(energy: np.ndarray, whole: np.ndarray) -> float:
    """How much of a layer's energy is left; 1 where the text never reached it."""
    left, total = float(energy.sum()), float(whole.sum())
    return min(1.0, left / total) if np.isfinite(left) and np.isfinite(total) and total > 0 else 1.0
