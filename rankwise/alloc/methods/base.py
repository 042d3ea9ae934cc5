"""The protocol that every allocation method follows."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np

from rankwise.alloc.budget import Choices, layer_choices, require_choices, require_exact, require_reachable, tighten
from rankwise.config import check, check_count, check_fraction
from rankwise.errors import RankwiseError
from rankwise.plan import KINDS, LayerSpec, RankPlan

SIDES = ("one", "two")
NEVER_SEEN = 1e30  # nats; dearer than any component of a layer that was seen


class Scores(Protocol):
    """What a method is told of the factors: shapes and spectra."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name to (out, in)."""
        ...

    @property
    def energies(self) -> dict[str, np.ndarray]:
        """Layer name to the `[r]` squared singular values in the metric."""
        ...


@dataclass(frozen=True)
class Method:
    """Options that all methods share; a subclass is one method.

    Args:
        ratio: share of the linear layers' parameters to keep.
        kinds: what a layer may become.
        rank_multiple: ranks are multiples of it.
        tolerance: largest relative miss of `ratio`.
        sides: `one` (input metric) or `two` (input and output-gradient metric); None is the method's own.
    """

    ratio: float = 0.8
    kinds: tuple[str, ...] = KINDS
    rank_multiple: int = 8
    tolerance: float = 0.001
    sides: str | None = None

    name: ClassVar[str]
    default_sides: ClassVar[str]

    def __post_init__(self) -> None:
        check_fraction("ratio", self.ratio)
        check_fraction("tolerance", self.tolerance)
        check_count("rank_multiple", self.rank_multiple, 1)
        for kind in self.kinds:
            check("kinds", kind, kind in KINDS, ", ".join(KINDS))
        check("kinds", self.kinds, len(self.kinds) > 0, ", ".join(KINDS))
        if self.sides is None:
            object.__setattr__(self, "sides", self.default_sides)
        check("sides", self.sides, self.sides in SIDES, ", ".join(SIDES))

    @property
    def two_sided(self) -> bool:
        """True if output-gradient moments are needed."""
        return self.sides == "two"

    def options(self) -> dict[str, Any]:
        """The method and its options as JSON-ready data, for provenance."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"method": self.name, **values, "kinds": list(self.kinds)}

    def check_budget(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Raise a RankwiseError if the budget is out of reach whatever the spectra, before they are measured."""
        choices = self._choices(shapes, {name: np.zeros(min(shape)) for name, shape in shapes.items()})
        total = sum(m * n for m, n in shapes.values())
        require_choices(choices, self.rank_multiple)
        require_reachable(choices, self.ratio * total, total)

    def allocate(self, scores: Scores, weights: str = "bf16") -> RankPlan:
        """Choose a kind and a rank for every layer under the budget.

        Args:
            scores: shapes and spectra, in model order.
            weights: how numbers will be stored.

        Returns:
            A plan whose ratio is within `tolerance` of `ratio`.

        Raises:
            RankwiseError: the budget cannot be met.
        """
        self.check_budget(scores.shapes)
        choices = self._choices(scores.shapes, scores.energies)
        total = sum(m * n for m, n in scores.shapes.values())
        picked = tighten(choices, self._pick(choices, self.ratio * total), self.ratio * total, self.tolerance)
        require_exact(choices, picked, self.ratio * total, total, self.tolerance)
        chosen = {name: (choices[name].kind[i], int(choices[name].rank[i])) for name, i in picked.items()}
        return RankPlan({name: self.spec(name, *chosen[name], scores, weights) for name in scores.shapes})

    def spec(self, name: str, kind: str, rank: int, scores: Scores, weights: str) -> LayerSpec:
        """A LayerSpec with its kept energy and predicted loss filled in."""
        if name not in scores.shapes:
            raise RankwiseError(name, "no such module", "the plan names a layer that the model lacks")
        (m, n), energy = scores.shapes[name], scores.energies[name]
        total, lost = float(energy.sum()), 0.0 if kind == "dense" else float(energy[rank:].sum())
        known = np.isfinite(total) and total > 0
        kept = 1.0 - lost / total if known else None
        loss = lost / 2 if known and self.two_sided else None
        return LayerSpec(kind, m, n, rank, weights, energy=kept, loss=loss)

    def restate(self, plan: RankPlan, scores: Scores, weights: str) -> RankPlan:
        """A plan made elsewhere, its energies and losses filled in from these factors."""
        return RankPlan({name: self.spec(name, spec.kind, spec.rank, scores, weights) for name, spec in plan})

    def _choices(self, shapes: dict[str, tuple[int, int]], energies: dict[str, np.ndarray]) -> dict[str, Choices]:
        return {
            name: layer_choices(m, n, self._worth(energies[name]), self.kinds, self.rank_multiple)
            for name, (m, n) in shapes.items()
        }

    def _worth(self, energy: np.ndarray) -> np.ndarray:
        """Make layers comparable: two-sided energies are; one-sided ones count as shares of their layer.

        A layer that the calibration never reached has infinite energy: it is the last to be compressed.
        """
        total = energy.sum()
        if not np.isfinite(total):
            return np.full_like(energy, NEVER_SEEN)
        return energy if self.two_sided or total <= 0 else energy / total

    def _pick(self, choices: dict[str, Choices], target: float) -> dict[str, int]:
        """Layer to the index of its choice; total cost at most `target`."""
        raise NotImplementedError
