"""Heal: a short distillation of the kept factors from the dense model, ranks unchanged.

Adam on the factors' own entries, and on the weights of layers that have lost channels, against the dense model's
next-token distribution; embeddings, norms, head and other dense layers stay as they are. Every few steps the held-out
divergence is measured; what is returned is the best point met, so a healing that does harm changes nothing.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.alloc.objectives import loss_scale
from rankwise.alloc.seeds import generator
from rankwise.alloc.teacher import Teacher
from rankwise.alloc.trainstate import StateFile
from rankwise.config import check, check_count, check_seed
from rankwise.errors import RankwiseError
from rankwise.progress import Track, say, silent

STATE = "heal.safetensors"
WARMUP = 0.05  # share of the steps in which the rate rises
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class HealConfig:
    """How to heal.

    Args:
        steps: optimiser steps; 0 leaves the factors alone.
        batch: windows a step.
        lr: peak learning rate of Adam; it rises over the first twentieth and falls along a half cosine to a tenth.
        check_every: steps between two measurements on the held-out windows, each followed by a save.
        seed: fixes the order of the windows.
    """

    steps: int = 100
    batch: int = 1
    lr: float = 3e-5
    check_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("heal", self.steps, 0)
        check_count("batch", self.batch, 1)
        check_count("check_every", self.check_every, 1)
        check("lr", self.lr, 0 < self.lr < math.inf, "a finite number above 0")
        check_seed(self.seed)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rise = max(1, round(WARMUP * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        share = (step - rise) / max(1, self.steps - rise)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


@dataclass
class Healing:
    """How far a healing is, and the best point that it met.

    Args:
        step: steps done.
        before: held-out divergence before, nats a token.
        best: the least held-out divergence met.
        history: (step, held-out divergence) of every measurement.
    """

    step: int = 0
    before: float = math.inf
    best: float = math.inf
    history: list[tuple[int, float]] | None = None


class _Masters:
    """fp32 copies of the trained parameters, Adam on them, and the best values met."""

    def __init__(self, parameters: dict[str, nn.Parameter], lr: float) -> None:
        self.live = parameters
        self.full = {name: nn.Parameter(p.detach().float().clone()) for name, p in parameters.items()}
        self.best = {name: p.detach().clone() for name, p in parameters.items()}
        self.optimiser = torch.optim.Adam(self.full.values(), lr=lr, betas=BETAS)

    def step(self, rate: float, scale: float) -> None:
        """One step of Adam from the gradients of a loss times `scale`; none where these hold NaN or Inf."""
        for name, live in self.live.items():
            self.full[name].grad, live.grad = None if live.grad is None else live.grad.float().div_(scale), None
        if not torch.isfinite(nn.utils.clip_grad_norm_(self.full.values(), 1.0)):
            return
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.put(self.full)

    @torch.no_grad()
    def put(self, values: dict[str, Any]) -> None:
        for name, live in self.live.items():
            live.copy_(values[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a resumed healing needs beside the optimiser."""
        full = {f"full.{name}": parameter for name, parameter in self.full.items()}
        return full | {f"best.{name}": value for name, value in self.best.items()}

    def keep(self) -> None:
        self.best = {name: live.detach().clone() for name, live in self.live.items()}


def heal(
    model: Any,
    names: list[str],
    teacher: Teacher,
    windows: torch.Tensor,
    held_out: int,
    config: HealConfig,
    folder: Path,
    identity: dict[str, Any],
    *,
    track: Track = silent,
) -> Healing:
    """Distil into the parameters of the named layers, in place, or finish what `folder` holds of it.

    Args:
        model: the compressed model on its device.
        names: modules whose matrices are trained (factors, or weights; one-element guards and biases are not).
        teacher: has listened to all of `windows`.
        windows: `[N, T]` token ids; the last `held_out` of them judge.
        held_out: at least 1, and fewer than there are.
        config: steps and rates.
        folder: keeps the state that a killed run continues from.
        identity: what the healing belongs to, its options included.
        track: progress.

    Raises:
        RankwiseError: the folder belongs to another healing, the loss is no number, or no layer is compressed.
    """
    if not 0 < held_out < len(windows):
        raise RankwiseError("held-out windows", held_out, f"allowed: 1 to {len(windows) - 1}")
    parameters = dict(_matrices(model, names))
    if not parameters:
        raise RankwiseError("heal", "no compressed layer", "there is nothing to train")
    last = range(len(windows) - held_out, len(windows))
    with _trainable(model, parameters), track("heal", config.steps) as advance:
        masters = _Masters(parameters, config.lr)
        state = StateFile(folder / STATE, identity, "heal")
        found = _load(state, masters)
        if found.history is None:
            found.history = []
            _judge(found, model, teacher, windows, last, masters)
            found.before = found.best
        for _ in range(found.step):
            advance()
        while found.step < config.steps:
            loss = _step(model, masters, teacher, windows, len(windows) - held_out, found.step, config)
            found.step += 1
            if found.step % config.check_every == 0 or found.step == config.steps:
                _judge(found, model, teacher, windows, last, masters)
                state.save(masters.tensors(), masters.optimiser, masters.full, found.__dict__)
            advance()
            say(advance, f"divergence {loss:.3f}, held out {found.best:.3f} (from {found.before:.3f})")
        masters.put(masters.best)
    return found


@contextmanager
def _trainable(model: Any, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """These parameters alone take gradients while the context lasts."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter in parameters.values():
            parameter.grad = None


def _matrices(model: Any, names: list[str]) -> Iterator[tuple[str, nn.Parameter]]:
    for name in names:
        for part, parameter in model.get_submodule(name).named_parameters():
            if parameter.ndim == 2 and parameter.is_floating_point():
                yield f"{name}.{part}", parameter


def _step(
    model: Any, masters: _Masters, teacher: Teacher, windows: torch.Tensor, count: int, step: int, config: HealConfig
) -> float:
    """One optimiser step over the next windows, in an order drawn anew for every pass."""
    device, total = next(model.parameters()).device, 0.0
    for position in range(step * config.batch, (step + 1) * config.batch):
        passes, at = divmod(position, count)
        order = torch.randperm(count, generator=generator(config.seed, passes))
        number = int(order[at])
        logits = model(input_ids=windows[number][None].to(device), use_cache=False).logits[0]
        loss = teacher.divergence(number, logits) / config.batch
        if not torch.isfinite(loss):
            value = f"loss {float(loss.detach())} in step {step}"
            raise RankwiseError("heal", value, "try a smaller rate, or --dtype bf16")
        scale = loss_scale(logits.dtype)
        (loss * scale).backward()
        total += float(loss.detach())
    masters.step(config.rate(step), scale)
    return total


@torch.no_grad()
def _judge(found: Healing, model: Any, teacher: Teacher, windows: torch.Tensor, last: range, masters: _Masters) -> None:
    device = next(model.parameters()).device
    losses = []
    for number in last:
        logits = model(input_ids=windows[number][None].to(device), use_cache=False).logits[0]
        losses.append(float(teacher.divergence(number, logits)))
    value = sum(losses) / len(losses)
    found.history = [*(found.history or []), (found.step, value)]
    if value < found.best:
        found.best = value
        masters.keep()


def _load(state: StateFile, masters: _Masters) -> Healing:
    found = state.load(masters.optimiser, masters.full)
    if found is None:
        return Healing()
    tensors, known = found
    for name, full in masters.full.items():
        full.data.copy_(tensors[f"full.{name}"])
        masters.best[name] = tensors[f"best.{name}"].to(full.device)
    masters.put(masters.full)
    infinite = {key: math.inf for key in ("before", "best") if known[key] is None}  # JSON cannot say so
    return Healing(**(known | infinite))
