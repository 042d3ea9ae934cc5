"""Dobi-SVD's allocation: its loss by hand, and a soft mask that is run as it is."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.alloc.bank import Bank
from rankwise.alloc.masks import Tanh
from rankwise.alloc.methods import Dobi
from rankwise.alloc.methods.trained import Task
from rankwise.alloc.objectives import language_loss
from rankwise.alloc.train import Step
from rankwise.errors import RankwiseError

SHAPES = {"a": (24, 16), "b": (16, 16)}


def setting(method: Dobi) -> tuple[Task, Bank]:
    energies = {name: np.ones(min(shape)) for name, shape in SHAPES.items()}
    scores: Any = SimpleNamespace(shapes=SHAPES, energies=energies)
    task = method._task(method.choices(SHAPES, energies), scores, 0)
    return task, method._bank(task)


def step_of(task: Task, bank: Bank, logits: torch.Tensor) -> Step:
    drawn = bank.draw(torch.Generator())
    shares = {name: task.ledger.curves[name].share(entry.rank) for name, entry in drawn.items()}
    return Step(0, torch.arange(6)[None], logits, drawn, shares, [], [])


def test_the_loss_by_hand() -> None:
    method = Dobi(0.5, ("dense", "lowrank"), 1)
    task, bank = setting(method)
    for mask, gamma in zip(bank.masks, (12.0, 17.6), strict=True):
        assert isinstance(mask, Tanh)
        mask.place.data = torch.tensor(gamma / 16)
    step = step_of(task, bank, torch.randn(1, 6, 7))
    ratio, terms = method._objective(task, bank)(step)
    assert float(ratio.detach()) == pytest.approx(1)  # both cost more than dense, and count as dense
    assert float(terms["compression"].detach()) == pytest.approx(100)
    assert float(terms["perplexity"]) == pytest.approx(math.exp(float(language_loss(step.logits, step.ids))), rel=1e-5)
    assert float(terms["range"].detach()) == pytest.approx(10 * (1.6 / 16) / 2, rel=1e-3)


def test_a_hopeless_perplexity_stays_a_number() -> None:
    task, bank = setting(Dobi(0.5, rank_multiple=1))
    logits = torch.full((1, 6, 7), -1000.0)
    logits[..., 0] = 0
    _, terms = Dobi(0.5)._objective(task, bank)(step_of(task, bank, logits))
    assert math.isfinite(float(terms["perplexity"]))


def test_every_layer_starts_at_the_ratio() -> None:
    task, bank = setting(Dobi(0.5, rank_multiple=1))
    for name, rank in bank.ranks().items():
        assert task.ledger.curves[name].share(rank) == pytest.approx(0.5, abs=1e-5)


def test_the_rate_falls_to_four_fifths() -> None:
    recipe = Dobi()._recipe()
    assert (recipe.optimiser, recipe.rate(recipe.steps) / recipe.rate(0)) == ("adam", pytest.approx(0.8))


@pytest.mark.parametrize(("option", "value"), [("beta", 0), ("weight", -1), ("penalty", None)])
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(RankwiseError) as caught:
        Dobi(**{option: value})
    assert caught.value.field == option
