"""Part of a refit: matrices of the plan's ranks, between the old ones and the refitted ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refitting import CPU, Fit, make_fit

from rankwise.alloc import partway
from rankwise.alloc.factors import factorize
from rankwise.alloc.methods import Global
from rankwise.alloc.partway import part_way
from rankwise.alloc.refit import old_tensors
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.solve import product
from rankwise.anatomy import block_linears, weight_of

METHODS = {
    "all kinds": Global(0.7, rank_multiple=1),
    "channels": Global(0.6, rank_multiple=1, channel_multiple=4),
}


@pytest.fixture(params=METHODS)
def fit(
    request: pytest.FixtureRequest, tiny: Callable[..., Any], spoken: Callable[..., torch.Tensor], tmp_path: Path
) -> Fit:
    model = tiny("llama")
    return make_fit(model, spoken(model, 32, 32), tmp_path, METHODS[request.param])


def go(fit: Fit, share: float, folder: Path) -> Refitted:
    """So much of the refit, in a folder."""
    into = Refitted(folder, fit.store, {"share": share})
    return part_way(fit.model, fit.plan, fit.refitted, fit.curvature, share, into, device=CPU)


def before(fit: Fit, name: str) -> torch.Tensor:
    """A layer's matrix before the refit."""
    weight = weight_of(fit.model.get_submodule(name))
    old = old_tensors(fit.store, name, fit.plan.layers[name], weight)
    return product(old) if old else weight


def test_each_layer_is_the_best_matrix_of_its_rank_between_the_two(fit: Fit, tmp_path: Path) -> None:
    half, outcomes = go(fit, 0.5, tmp_path / "half"), fit.refitted.outcomes()
    kinds = set()
    for index, block in enumerate(block_linears(fit.model)):
        whole, found = fit.refitted.weights(index), half.weights(index)
        inputs, outputs = fit.curvature.metric(index)
        assert found.keys() == whole.keys()
        for name in block:
            if outcomes[name].share is None:
                assert name not in found or torch.equal(found[name], whole[name])
                continue
            spec, wanted = fit.plan.layers[name], (before(fit, name) + whole[name]) / 2
            if spec.kind != "dense":
                metric = inputs[name], outputs[name]
                pair = metric if fit.store.channels is None else fit.store.channels.restrict(name, *metric)
                factors = factorize(wanted, *pair)
                wanted = factors.u[:, : spec.rank] @ factors.v[: spec.rank]
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)
            kinds.add(spec.kind)
    assert "pivot" in kinds
    assert half.outcomes() == outcomes


def test_almost_all_of_the_way_is_the_refit(fit: Fit, tmp_path: Path) -> None:
    whole = go(fit, 1 - 1e-6, tmp_path / "whole")
    for index in range(2):
        refitted = fit.refitted.weights(index)
        for name, weight in whole.weights(index).items():
            torch.testing.assert_close(weight, refitted[name], rtol=1e-3, atol=1e-4)


def test_what_is_done_is_found_again(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = go(fit, 0.5, tmp_path / "half")
    files = [first.file(index).read_bytes() for index in range(2)]
    first.file(1).unlink()
    made: list[int] = []
    metric_of = partway.metric_of

    def spy(curvature: Any, index: int, *given: Any) -> Any:
        made.append(index)
        return metric_of(curvature, index, *given)

    monkeypatch.setattr(partway, "metric_of", spy)
    again = go(fit, 0.5, tmp_path / "half")
    assert made == [1]
    assert [again.file(index).read_bytes() for index in range(2)] == files
