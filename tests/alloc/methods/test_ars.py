"""ARS: its losses by hand, and its network in place of masks."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.alloc.hypernet import HyperNet
from rankwise.alloc.methods import Ars
from rankwise.alloc.methods.ars import _singular_values
from rankwise.alloc.objectives import alignment_loss, language_loss
from rankwise.alloc.train import Step
from rankwise.errors import RankwiseError

SHAPES = {"a": (24, 16), "b": (16, 16)}


def test_the_loss_by_hand() -> None:
    method = Ars(0.5, rank_multiple=1, weight=16.0, alignment=2.0)
    energies = {"a": np.linspace(9, 1, 16), "b": np.full(16, np.inf)}
    scores: Any = SimpleNamespace(shapes=SHAPES, originals=SHAPES, removed={}, energies=energies)
    task = method._task(method.choices(SHAPES, energies), scores, 4)
    net = method._bank(task)
    assert isinstance(net, HyperNet)
    with torch.no_grad():
        for head in net.heads:
            head.bias -= 3  # as many kept as not
    drawn = net.draw(torch.Generator().manual_seed(1))
    shares = {name: task.ledger.curves[name].share(entry.rank) for name, entry in drawn.items()}
    ids, logits = torch.arange(6)[None], torch.randn(1, 6, 7)
    ratio, terms = method._objective(task, net)(Step(0, ids, logits, drawn, shares, [], []))
    ranks = {name: int(entry.mask.sum()) for name, entry in drawn.items()}
    kept = (ranks["a"] * (40 - ranks["a"]) + ranks["b"] * (32 - ranks["b"])) / (24 * 16 + 16 * 16)
    assert float(ratio.detach()) == pytest.approx(kept)
    assert float(terms["compression"].detach()) == pytest.approx(16 * math.log(kept / 0.5), rel=1e-5)
    apart = [
        alignment_loss(drawn["a"].mask, torch.linspace(9, 1, 16).sqrt()),
        alignment_loss(drawn["b"].mask, torch.ones(16)),
    ]
    assert float(terms["alignment"].detach()) == pytest.approx(float(sum(apart).detach()), rel=1e-5)
    assert float(terms["ce"]) == float(language_loss(logits, ids))


def test_masks_skip_components_in_training_and_never_in_the_plan() -> None:
    method = Ars(0.5)
    energies = {name: np.ones(min(shape)) for name, shape in SHAPES.items()}
    entry = method.choices(SHAPES, energies)["a"]
    assert method._kept(entry, 0) is None
    net = HyperNet({"a": 40}, 0)
    with torch.no_grad():
        net.heads[0].bias -= 3
    assert isinstance(net.draw(torch.Generator().manual_seed(0))["a"].keep, torch.Tensor)


def test_layers_never_seen_are_aligned_as_if_all_were_equal() -> None:
    assert _singular_values(np.array([4.0, 1.0])).tolist() == [2, 1]
    assert _singular_values(np.array([np.inf, np.inf])).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("option", "value"), [("weight", -1), ("alignment", -0.1), ("temperature", 0), ("start", "global")]
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(RankwiseError) as caught:
        Ars(**{option: value})
    assert caught.value.field == option
