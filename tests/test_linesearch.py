"""The line search: the share of a refit that loses least on text, and a model that is as it was."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from refitting import CPU, Fit, make_fit, share_of

from rankwise import linesearch
from rankwise.alloc.methods import Global
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore
from rankwise.errors import RankwiseError
from rankwise.evaluate import perplexity
from rankwise.linesearch import loss_with, search_share
from rankwise.pipeline import compress
from rankwise.plan import RankPlan


@pytest.fixture
def fit(tiny: Callable[..., Any], spoken: Callable[..., torch.Tensor], tmp_path: Path) -> Fit:
    model = tiny("llama")
    return make_fit(model, spoken(model, 32, 32), tmp_path, Global(0.7, rank_multiple=1))


def search(fit: Fit) -> Any:
    """What is chosen, and the losses."""
    return search_share(fit.model, fit.plan, fit.refitted, fit.curvature, fit.judges, device=CPU)


def with_share(fit: Fit, share: float) -> FactorStore | Refitted:
    """The factors of a share, from the folder where the search has left them."""
    if share in (0.0, 1.0):
        return fit.refitted if share else fit.store
    folder = fit.refitted.folder
    return Refitted(folder.with_name(f"{folder.name}-{share:g}"), fit.store, fit.refitted.identity | {"share": share})


def test_losses_are_those_of_the_compressed_models(fit: Fit) -> None:
    before = {name: tensor.clone() for name, tensor in fit.model.state_dict().items()}
    best, losses = search(fit)
    assert list(losses) == [1.0, 0.75, 0.5, 0.0]
    assert share_of(best) == min(losses, key=losses.__getitem__)
    for share in losses:
        small = compress(deepcopy(fit.model), fit.plan, with_share(fit, share))
        assert math.log(perplexity(small, fit.judges)) == pytest.approx(losses[share], rel=1e-5)
    after = fit.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert any(spec.kind == "dense" for _, spec in fit.plan)  # which a refit changes in place


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5, 0.0])
def test_the_share_that_text_likes_is_taken_and_known_ever_after(
    share: float, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = 1.0 if share == 0.0 else 0.0

    def liked(model: Any, plan: RankPlan, factors: FactorStore | Refitted, *_: Any) -> float:
        own = share_of(factors)
        return math.nan if own == broken else abs(own - share)

    monkeypatch.setattr(linesearch, "loss_with", liked)
    best, losses = search(fit)
    assert share_of(best) == share
    assert losses == {tried: abs(tried - share) for tried in (1.0, 0.75, 0.5, 0.0) if tried != broken}
    monkeypatch.setattr(linesearch, "loss_with", pytest.fail)
    again, known = search(fit)
    assert share_of(again) == share
    assert known == losses


def test_a_model_that_cannot_be_run_is_no_choice(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linesearch, "loss_with", lambda *_: math.nan)
    with pytest.raises(RankwiseError, match="NaN or Inf in the compressed model"):
        search(fit)


def test_the_old_factors_stay_where_every_share_loses(fit: Fit, tmp_path: Path) -> None:
    spoilt = Refitted(tmp_path / "spoilt", fit.store, {})
    for index in range(2):
        layers = {
            name: {part: tensor * (3 if part in ("u", "weight") else 1) for part, tensor in parts.items()}
            for name, parts in fit.refitted.tensors(index).items()
        }
        names = list(fit.store.layers[index])
        spoilt.write(index, layers, {name: fit.refitted.outcomes()[name] for name in names})
    fit.refitted = spoilt
    best, losses = search(fit)
    assert min(losses, key=losses.__getitem__) == 0.0
    assert best is fit.store


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_without_channels_are_judged_as_they_will_be(
    family: str, tiny: Callable[..., Any], spoken: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    model = tiny(family)
    fit = make_fit(model, spoken(model, 32, 32), tmp_path, Global(0.6, rank_multiple=1, channel_multiple=4))
    assert fit.store.removed
    expected = model(fit.judges).logits
    for store in (fit.store, fit.refitted):
        small = compress(deepcopy(model), fit.plan, store)
        assert math.log(perplexity(small, fit.judges)) == pytest.approx(
            loss_with(model, fit.plan, store, fit.judges), rel=1e-5
        )
    assert torch.equal(model(fit.judges).logits, expected)
