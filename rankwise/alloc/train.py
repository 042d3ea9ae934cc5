"""One training loop for all methods that learn masks: a frozen model, masked linear layers, mask parameters alone.

Every step is a function of what was learnt before it, the seed and its number: which text it sees and what noise it
draws. So a run that was killed and continued, by as many processes, learns the same to the last bit.

Several processes (`rankwise.distributed`) share out the sequences of a step, add up their gradients, and make the same
step each; the main one writes. Those for which no sequence is left do not take the model to their device. What is
learnt is that of one process up to the rounding of sums.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rankwise.alloc.bank import Bank
from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import hash_windows
from rankwise.alloc.curve import Ledger
from rankwise.alloc.exchange import sum_gradients
from rankwise.alloc.hypernet import HyperNet
from rankwise.alloc.masks import Drawn
from rankwise.alloc.objectives import loss_scale
from rankwise.alloc.overlay import Overlay, overlaid
from rankwise.alloc.seeds import generator
from rankwise.alloc.trainstate import Progress, TrainState
from rankwise.distributed import gather, own, rank, require_same
from rankwise.errors import RankwiseError
from rankwise.progress import say

OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        steps: at most so many.
        train_len: tokens a sequence; windows are cut into pieces of it (shorter windows are taken whole).
        batch: sequences a step.
        lr: learning rate.
        last_lr: learning rate at the end of a half cosine; None keeps `lr`.
        optimiser: `adam` or `adamw`; without weight decay.
        target: ratio that the budget asks for.
        after: stop so many steps after the ratio was first met; None runs all steps.
        taps: the objective compares hidden states with the dense model's.
        probe: dense layers give their masks a gradient, see `kernels.mask_probe`.
        dense: layers may run dense.
        checkpointing: run each block again in the backward pass instead of keeping its activations.
        save_every: steps between two saves.
    """

    steps: int
    train_len: int
    batch: int
    lr: float
    target: float
    last_lr: float | None = None
    optimiser: str = "adamw"
    after: int | None = None
    taps: bool = False
    probe: bool = False
    dense: bool = False
    checkpointing: bool = False
    save_every: int = 50

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if self.last_lr is None:
            return self.lr
        share = 1 - torch.cos(torch.tensor(torch.pi * step / self.steps, dtype=torch.float64)).item()
        return self.lr + (self.last_lr - self.lr) * share / 2


@dataclass(frozen=True)
class Step:
    """What an objective sees of one step.

    Args:
        number: from 0.
        ids: `[B, T]` tokens.
        logits: `[B, T, vocab]` of the masked model.
        drawn: every layer's mask.
        shares: every layer's parameter ratio, a differentiable scalar that may be above 1.
        taps: hidden states of the masked model, see `Overlay.run`.
        teacher: the dense model's.
    """

    number: int
    ids: torch.Tensor
    logits: torch.Tensor
    drawn: dict[str, Drawn]
    shares: dict[str, torch.Tensor]
    taps: list[torch.Tensor]
    teacher: list[torch.Tensor]


# Ratio kept, and the terms of the loss. Where processes share a step, each term must be a mean over its sequences, or
# not depend on them.
Objective = Callable[[Step], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def train(
    bank: Bank | HyperNet,
    ledger: Ledger,
    recipe: Recipe,
    objective: Objective,
    calibration: Calibration,
    identity: dict[str, Any],
) -> None:
    """Train a bank of masks in place, or finish what the calibration's folder holds of it.

    Args:
        bank: the masks.
        ledger: what ranks cost.
        recipe: how to train.
        objective: the method's loss.
        calibration: model, text, factors, folder.
        identity: what else the training depends on, e.g. the method's options.

    Raises:
        RankwiseError: the folder holds another training, or a loss is NaN or Inf.
    """
    bank.to(calibration.device)
    pieces = _pieces(calibration.windows, recipe.train_len)
    known = {**identity, "recipe": asdict(recipe), "text": hash_windows(pieces), "seed": calibration.seed}
    state = TrainState(calibration.folder, known)
    optimiser = OPTIMISERS[recipe.optimiser](bank.parameters(), lr=recipe.lr, weight_decay=0.0)
    progress = state.load(bank, optimiser)
    require_same("training", progress.__dict__)
    if not progress.finished:
        loop = _Loop(bank, ledger, recipe, objective, calibration, pieces, state, optimiser, progress)
        with torch.enable_grad():
            loop.run()
    state.write_masks(bank.importances(), bank.ranks())


@dataclass
class _Loop:
    bank: Bank | HyperNet
    ledger: Ledger
    recipe: Recipe
    objective: Objective
    calibration: Calibration
    pieces: torch.Tensor
    state: TrainState
    optimiser: torch.optim.Optimizer
    progress: Progress

    def run(self) -> None:
        recipe, progress = self.recipe, self.progress
        options = {"probe": recipe.probe, "dense": recipe.dense or recipe.taps, "checkpointing": recipe.checkpointing}
        track = self.calibration.track("masks", recipe.steps)
        idle = rank() >= recipe.batch
        with (
            nullcontext() if idle else overlaid(self.calibration, self.bank.sizes, **options) as overlay,
            track as advance,
        ):
            for _ in range(progress.step):
                advance()
            while not progress.finished:
                line = self._step(overlay)
                self.state.log(line)
                advance()
                say(advance, ", ".join(f"{key} {value:.4g}" for key, value in line.items() if key != "step"))
                if progress.finished or progress.step % recipe.save_every == 0:
                    self.state.save(self.bank, self.optimiser, progress)

    def _step(self, overlay: Overlay | None) -> dict[str, Any]:
        """One step; returns its line of the log."""
        number, began = self.progress.step, time.perf_counter()
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate(number)
        ratio, terms = self._backward(overlay, number)
        self.optimiser.step()
        self._count(ratio)
        seconds = round(time.perf_counter() - began, 3)
        return {"step": number, "ratio": ratio, **terms, "seconds": seconds}

    def _backward(self, overlay: Overlay | None, number: int) -> tuple[float, dict[str, float]]:
        """Gradients of the mask parameters, of all processes; returns the ratio and every term of the loss."""
        drawn = self.bank.draw(generator(self.calibration.seed, number))
        self.optimiser.zero_grad()
        mine = self._batch(number)[list(own(self.recipe.batch))]
        told = gather((0.0, {}) if overlay is None else self._pass(overlay, number, drawn, mine.to(overlay.device)))
        sum_gradients(self.bank.parameters())
        ratio, names = told[0][0], told[0][1]  # the main process always has a sequence
        return ratio, {name: sum(terms.get(name, 0.0) for _, terms in told) for name in names}

    def _pass(
        self, overlay: Overlay, number: int, drawn: dict[str, Drawn], ids: torch.Tensor
    ) -> tuple[float, dict[str, float]]:
        """What the sequences `ids` add to the gradients and to every term of the loss; and the ratio."""
        part = len(ids) / self.recipe.batch
        teacher = self._teacher(overlay, ids)
        shares = {name: self.ledger.curves[name].share(entry.rank) for name, entry in drawn.items()}
        with _drawn(overlay, drawn):
            logits, taps = overlay.run(ids, taps=self.recipe.taps)
            ratio, terms = self.objective(Step(number, ids, logits, drawn, shares, taps, teacher))
            loss = torch.stack([term.float().to(overlay.device) for term in terms.values()]).sum()
            if not torch.isfinite(loss):
                raise RankwiseError("loss", f"{float(loss.detach())} in step {number}", "try --dtype bf16 or fp32")
            scale = loss_scale(logits.dtype)
            (loss * (scale * part)).backward()
        for parameter in self.bank.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale).nan_to_num_(0.0, 0.0, 0.0)
        return float(ratio.detach()), {key: part * float(term.detach()) for key, term in terms.items()}

    @torch.no_grad()
    def _teacher(self, overlay: Overlay, ids: torch.Tensor) -> list[torch.Tensor]:
        return overlay.run(ids, taps=True)[1] if self.recipe.taps else []

    def _count(self, ratio: float) -> None:
        progress, recipe = self.progress, self.recipe
        if progress.reached is None and ratio <= recipe.target:
            progress.reached = progress.step
        progress.step += 1
        enough = None if progress.reached is None or recipe.after is None else progress.reached + recipe.after
        progress.finished = progress.step >= recipe.steps or (enough is not None and progress.step > enough)

    def _batch(self, number: int) -> torch.Tensor:
        """`[B, T]`: the pieces in an order that is drawn anew for every pass through the text."""
        first = number * self.recipe.batch
        places = [divmod(position, len(self.pieces)) for position in range(first, first + self.recipe.batch)]
        return torch.stack([self.pieces[self._order(passes)[at]] for passes, at in places])

    def _order(self, passes: int) -> torch.Tensor:
        return torch.randperm(len(self.pieces), generator=generator(self.calibration.seed, -passes - 1))


@contextmanager
def _drawn(overlay: Overlay, drawn: dict[str, Drawn]) -> Iterator[None]:
    overlay.set(drawn)
    try:
        yield
    finally:
        overlay.set(None)


def _pieces(windows: torch.Tensor, length: int) -> torch.Tensor:
    """`[N, T]` windows cut into pieces of `length` tokens; shorter windows stay whole."""
    length = min(length, windows.shape[1])
    return windows[:, : windows.shape[1] // length * length].reshape(-1, length).cpu().contiguous()
