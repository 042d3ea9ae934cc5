"""A bank of masks answers for every layer by its name, whatever the name."""

import pytest
import torch

from rankwise.alloc.bank import Bank
from rankwise.alloc.gumbel import GumbelSigmoid
from rankwise.alloc.masks import Staircase, Tanh

NAMES = ("model.layers.0.q", "model.layers.0.k", "h.1.mlp")


def bank() -> Bank:
    return Bank(dict(zip(NAMES, (Staircase(20, 8.0), GumbelSigmoid(12, 5.0), Tanh(9, 4.0)), strict=True)))


def test_every_layer_is_answered_for_in_order() -> None:
    masks = bank()
    assert masks.sizes == dict(zip(NAMES, (20, 12, 9), strict=True))
    assert masks.ranks() == pytest.approx(dict(zip(NAMES, (8, 5, 4), strict=True)), abs=1e-2)
    drawn = masks.draw(torch.Generator().manual_seed(0))
    assert list(drawn) == list(masks.importances()) == list(NAMES)
    for name, importance in masks.importances().items():
        assert len(drawn[name].mask) == len(importance) == masks.sizes[name]
        assert not importance.requires_grad
        assert drawn[name].mask.requires_grad


def test_layers_draw_noise_of_their_own() -> None:
    masks = Bank({name: GumbelSigmoid(30, 15.0) for name in NAMES})
    first, second, _ = masks.draw(torch.Generator().manual_seed(0)).values()
    assert not torch.equal(first.soft, second.soft)


def test_parameters_are_found_again() -> None:
    masks, others = bank(), bank()
    with torch.no_grad():
        for parameter in masks.parameters():
            parameter += 1
    others.load_state_dict(masks.state_dict())
    assert others.ranks() == masks.ranks() != bank().ranks()
    assert len(list(masks.parameters())) == 3
