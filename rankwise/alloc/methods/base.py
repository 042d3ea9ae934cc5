"""The protocol that every allocation method follows."""

from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol

import numpy as np

from rankwise.alloc.budget import Choices, layer_choices, require_choices, require_exact, require_reachable, tighten
from rankwise.alloc.calibration import Calibration
from rankwise.alloc.factors import SIDES
from rankwise.config import check, check_count, check_fraction
from rankwise.errors import RankwiseError
from rankwise.plan import KINDS, LayerSpec, RankPlan

LEAST = 0.5  # share of an MLP's channels that stay at least
NEVER_SEEN = 1e30  # nats; dearer than any component of a layer that was seen


class Scores(Protocol):
    """What a method is told of the factors: shapes and spectra."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name to (out, in)."""
        ...

    @property
    def originals(self) -> dict[str, tuple[int, int]]:
        """The same of the dense model, where some layers have lost channels."""
        ...

    @property
    def removed(self) -> dict[str, float]:
        """Layer that has lost columns to the predicted loss of that, nats a token."""
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
        sides: `one` (input metric), `two` (input and output-gradient metric) or `diagonal` (input magnitudes, ASVD);
            None is the method's own.
        keep: patterns (`*.down_proj`, `model.layers.0.*`) of layers that stay as they are.
    """

    ratio: float = 0.8
    kinds: tuple[str, ...] = KINDS
    rank_multiple: int = 8
    tolerance: float = 0.001
    sides: str | None = None
    keep: tuple[str, ...] = ()

    name: ClassVar[str]
    default_sides: ClassVar[str]
    refits: ClassVar[bool] = False  # True if factors are refitted unless the user says no
    learns: ClassVar[bool] = False  # True if `allocate` needs a Calibration: the method runs the model
    spends_bytes: ClassVar[bool] = False  # True if it can choose precisions too, under a budget of bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))  # JSON has lists
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

    @property
    def shared(self) -> bool:
        """True if several processes share out what it learns."""
        return False

    @property
    def width_multiple(self) -> int:
        """What the widths of MLPs are multiples of, where channels may be taken out of them; 0: they keep all."""
        return 0

    def options(self) -> dict[str, Any]:
        """The method and its options as JSON-ready data, for provenance."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {"method": self.name, **plain}

    def check_budget(self, shapes: dict[str, tuple[int, int]], total: int | None = None) -> None:
        """Raise a RankwiseError if the budget is out of reach whatever the spectra, before they are measured.

        Args:
            shapes: layer name to (out, in).
            total: parameters that the ratio refers to; those of the shapes by default.
        """
        self.check_keep(shapes)
        choices = self.choices(shapes, {name: np.zeros(min(shape)) for name, shape in shapes.items()})
        narrower = LEAST if total is None and self.width_multiple else 1.0  # channels are not known before
        total = sum(m * n for m, n in shapes.values()) if total is None else total
        require_choices(choices, self.rank_multiple)
        require_reachable(choices, self.ratio * total, total, narrower)

    def check_keep(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Raise a RankwiseError if a pattern of `keep` names no layer."""
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in shapes):
                raise RankwiseError("keep", pattern, f"a pattern that layers match, e.g. *{next(iter(shapes))[-9:]}")

    def pins(self, name: str) -> bool:
        """Whether a layer stays as it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.keep)

    def allocate(self, scores: Scores, weights: str = "bf16", calibration: Calibration | None = None) -> RankPlan:
        """Choose a kind and a rank for every layer under the budget.

        Args:
            scores: shapes and spectra, in model order.
            weights: how numbers will be stored.
            calibration: model and text, for methods that learn.

        Returns:
            A plan whose ratio is within `tolerance` of `ratio` (if the method is `exact`).

        Raises:
            RankwiseError: the budget cannot be met.
        """
        total = parameters(scores)
        self.check_budget(scores.shapes, total)
        choices = self.choices(scores.shapes, scores.energies)
        if self.learns:
            if calibration is None:
                raise RankwiseError("method", self.name, "it learns from the model, and needs a calibration")
            choices, picked = self._learn(choices, scores, calibration)
            calibration.learnt = choices
        else:
            picked = self._pick(choices, scores, self.ratio * total)
        return self._plan(choices, picked, scores, weights)

    def again(self, learnt: dict[str, Choices], scores: Scores, weights: str = "bf16") -> RankPlan:
        """A plan of this budget from choices that were learnt for another one: a Lagrangian fill of their losses.

        Raises:
            RankwiseError: the budget cannot be met.
        """
        from rankwise.alloc.methods.lagrange import Global

        total = parameters(scores)
        require_reachable(learnt, self.ratio * total, total)
        return self._plan(learnt, Global()._pick(learnt, scores, self.ratio * total), scores, weights)

    def _plan(self, choices: dict[str, Choices], picked: dict[str, int], scores: Scores, weights: str) -> RankPlan:
        """The plan of a selection, made exact where the method is."""
        total = parameters(scores)
        if self.exact:
            picked = tighten(choices, picked, self.ratio * total, self.tolerance)
            require_exact(choices, picked, self.ratio * total, total, self.tolerance)
        chosen = {name: (choices[name].kind[i], int(choices[name].rank[i])) for name, i in picked.items()}
        kept = {name: self._kept(choices[name], i) for name, i in picked.items()}
        return RankPlan({name: self.spec(name, *chosen[name], scores, weights, kept[name]) for name in scores.shapes})

    @property
    def exact(self) -> bool:
        """False for a method that repeats another's way of meeting budgets, misses included."""
        return True

    def _kept(self, entry: Choices, at: int) -> tuple[int, ...] | None:
        """The components that a choice keeps, where they are not the first ones."""
        return None

    def _learn(
        self, choices: dict[str, Choices], scores: Scores, calibration: Calibration
    ) -> tuple[dict[str, Choices], dict[str, int]]:
        """For methods with `learns`: choices (with the losses that were learnt) and the index picked for each layer."""
        raise NotImplementedError

    def spec(
        self,
        name: str,
        kind: str,
        rank: int,
        scores: Scores,
        weights: str,
        indices: tuple[int, ...] | None = None,
    ) -> LayerSpec:
        """A LayerSpec with its kept energy and predicted loss filled in; `indices` as in LayerSpec."""
        if name not in scores.shapes:
            raise RankwiseError(name, "no such module", "the plan names a layer that the model lacks")
        (m, n), energy = scores.shapes[name], scores.energies[name]
        dropped = energy[rank:] if indices is None else np.delete(energy, list(indices))
        total, lost = float(energy.sum()), 0.0 if kind == "dense" else float(dropped.sum())
        known = np.isfinite(total) and total > 0
        kept = 1.0 - lost / total if known else None
        loss = lost / 2 + scores.removed.get(name, 0.0) if known and self.two_sided else None
        dense = scores.originals[name]
        was = None if dense == (m, n) else dense
        return LayerSpec(kind, m, n, rank, weights, energy=kept, loss=loss, indices=indices, dense_shape=was)

    def restate(self, plan: RankPlan, scores: Scores, weights: str) -> RankPlan:
        """A plan made elsewhere, its energies and losses filled in from these factors; what is in 4 bits stays so."""
        found = {name: self.spec(name, s.kind, s.rank, scores, weights, s.indices) for name, s in plan}
        return RankPlan({n: found[n].stored_as(s.precision) if s.quantised else found[n] for n, s in plan})

    def choices(self, shapes: dict[str, tuple[int, int]], energies: dict[str, np.ndarray]) -> dict[str, Choices]:
        """Everything that layers may become, by their shapes (out, in) and the energies `[r]` of their factors."""
        return {
            name: layer_choices(m, n, self._worth(energies[name]), self._kinds(name), self.rank_multiple)
            for name, (m, n) in shapes.items()
        }

    def _kinds(self, name: str) -> tuple[str, ...]:
        return ("dense",) if self.pins(name) else self.kinds

    def _worth(self, energy: np.ndarray) -> np.ndarray:
        """Make layers comparable: two-sided energies are; those of the inputs alone count as shares of their layer.

        A layer that the calibration never reached has infinite energy: it is the last to be compressed.
        """
        total = energy.sum()
        if not np.isfinite(total):
            return np.full_like(energy, NEVER_SEEN)
        return energy if self.two_sided or total <= 0 else energy / total

    def _pick(self, choices: dict[str, Choices], scores: Scores, target: float) -> dict[str, int]:
        """Layer to the index of its choice; total cost at most `target`."""
        raise NotImplementedError


def parameters(scores: Scores) -> int:
    """Of the dense model's linear layers."""
    return sum(m * n for m, n in scores.originals.values())
