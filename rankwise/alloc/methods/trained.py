"""What all methods that train masks share: options, the order of work, and how learnt shares become a plan."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from rankwise.alloc.bank import Bank
from rankwise.alloc.budget import Choices
from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curve import Curve, Ledger
from rankwise.alloc.hypernet import HyperNet
from rankwise.alloc.learnt import learnt_choices, settle
from rankwise.alloc.methods.base import Method, Scores
from rankwise.alloc.methods.lagrange import Global
from rankwise.alloc.rescale import proportional
from rankwise.alloc.train import Objective, Recipe, train
from rankwise.config import check, check_count

RESCALES = ("proportional", "weighted")


@dataclass(frozen=True)
class Task:
    """What is to be learnt, worked out from the choices.

    Args:
        choices: layer to what it may become.
        scores: shapes and spectra.
        ledger: the layers with a mask, and what ranks cost.
        start: layer to the rank that it begins with.
        seed: fixes everything drawn at random.
    """

    choices: dict[str, Choices]
    scores: Scores
    ledger: Ledger
    start: dict[str, float]
    seed: int


@dataclass(frozen=True)
class Trained(Method):
    """Options of every method that trains masks.

    Args:
        steps: training steps, at most.
        train_len: tokens a sequence.
        batch: sequences a step.
        lr: learning rate; None is the paper's, times as much as the steps are fewer, so that parameters under Adam
            can move as far as the authors' (each method says what that comes to).
        start: `uniform` (every layer at the budget's ratio) or `global` (the closed-form plan of the same budget).
        rescale: how learnt shares are made to meet the budget; layers that learnt to be dense stay so. `proportional`:
            one factor on all others (ARA). `weighted`: they give up parameters where that costs the least, by their
            predicted losses, scaled so that at the learnt shares all are level (`alloc.learnt`).
        checkpointing: run each decoder block twice instead of keeping its activations.
        save_every: steps between two saves of the state that a killed run continues from.
    """

    steps: int = 400
    train_len: int = 512
    batch: int = 1
    lr: float | None = None
    start: str = "uniform"
    rescale: str = "proportional"
    checkpointing: bool = False
    save_every: int = 50

    default_sides: ClassVar[str] = "two"
    learns: ClassVar[bool] = True
    starts: ClassVar[tuple[str, ...]] = ("uniform", "global")
    paper_lr: ClassVar[float]
    paper_steps: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, lowest in (("steps", 1), ("train_len", 2), ("batch", 1), ("save_every", 1)):
            check_count(name, getattr(self, name), lowest)
        if self.lr is not None:
            check_positive("lr", self.lr)
        check("start", self.start, self.start in self.starts, ", ".join(self.starts))
        check("rescale", self.rescale, self.rescale in RESCALES, ", ".join(RESCALES))

    @property
    def rate(self) -> float:
        """The learning rate in use."""
        return self.paper_lr * self.paper_steps / self.steps if self.lr is None else self.lr

    @property
    def shared(self) -> bool:
        """Sequences of a step are; one alone cannot be."""
        return self.batch > 1

    def _bank(self, task: Task) -> Bank | HyperNet:
        """The masks at their start."""
        raise NotImplementedError

    def _objective(self, task: Task, bank: Bank | HyperNet) -> Objective:
        """The loss."""
        raise NotImplementedError

    def _recipe(self, **more: Any) -> Recipe:
        names = ("steps", "train_len", "batch", "checkpointing", "save_every")
        return Recipe(**{name: getattr(self, name) for name in names}, lr=self.rate, target=self.ratio, **more)

    def _learn(
        self, choices: dict[str, Choices], scores: Scores, calibration: Calibration
    ) -> tuple[dict[str, Choices], dict[str, int]]:
        task = self._task(choices, scores, calibration.seed)
        if not task.ledger.curves:
            return choices, {name: len(entry.kind) - 1 for name, entry in choices.items()}
        bank = self._bank(task)
        identity = {**self.options(), "curvature": calibration.curvature.identity}
        train(bank, task.ledger, self._recipe(), self._objective(task, bank), calibration, identity)
        return self._settle(task, bank)

    def _task(self, choices: dict[str, Choices], scores: Scores, seed: int) -> Task:
        masked = {name: scores.shapes[name] for name, entry in choices.items() if set(entry.kind) != {"dense"}}
        curves = {name: Curve(m, n, "pivot" in self.kinds) for name, (m, n) in masked.items()}
        fixed = sum(entry.dense_cost for name, entry in choices.items() if name not in masked)
        return Task(choices, scores, Ledger(curves, fixed), self._start(curves, scores), seed)

    def _start(self, curves: dict[str, Curve], scores: Scores) -> dict[str, float]:
        """Layer to the rank that it begins with; a dense layer begins where its share is 1."""
        if self.start != "global":
            return {name: curve.rank(self.ratio) for name, curve in curves.items()}
        same = Global(self.ratio, self.kinds, self.rank_multiple, self.tolerance, self.sides, self.keep)
        specs = same.allocate(scores).layers
        return {n: c.limit if specs[n].kind == "dense" else float(specs[n].rank) for n, c in curves.items()}

    def _settle(self, task: Task, bank: Bank | HyperNet) -> tuple[dict[str, Choices], dict[str, int]]:
        """Choices with learnt losses, and a selection that meets the budget."""
        shares = dict.fromkeys(task.choices, 1.0)
        shares |= {name: min(1.0, task.ledger.curves[name].share(rank)) for name, rank in bank.ranks().items()}
        learnt, target = learnt_choices(task.choices, shares), self.ratio * task.ledger.total

        def spend(some: dict[str, Choices], budget: float) -> dict[str, int]:
            if self.rescale == "weighted":
                return Global()._pick(some, task.scores, budget)
            return proportional(some, shares, budget)

        return learnt, settle(learnt, shares, target, spend)


def check_positive(name: str, value: Any, lowest: float = 0.0, *, above: bool = True) -> None:
    """`value` must be a finite number above (or from) `lowest`."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ok = number and (value > lowest if above else value >= lowest)
    check(name, value, ok, f"a finite number {'above' if above else 'from'} {lowest:g}")
