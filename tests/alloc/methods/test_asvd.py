"""ASVD on a model: factors in its metric, ranks by its search."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import collect
from rankwise.alloc.methods import Asvd, Strs
from rankwise.alloc.store import factorize_model
from rankwise.anatomy import block_linears, weight_of

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, 512, (3, 24), generator=torch.Generator().manual_seed(1))


def calibrate(model: Any, folder: Path) -> Calibration:
    curvature = collect(model, WINDOWS, None, folder / "curvature", device=CPU)
    store = factorize_model(model, curvature, folder / "factors", sides="diagonal", device=CPU)
    (folder / "work").mkdir()
    return Calibration(model, store, curvature, WINDOWS, folder / "work", CPU)


def test_it_is_strs_in_another_metric_with_the_papers_kinds() -> None:
    method = Asvd(0.9)
    assert isinstance(method, Strs)
    assert (method.sides, method.kinds, method.learns) == ("diagonal", ("dense", "lowrank"), True)
    assert method.grid == (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert not method.two_sided


def test_truncation_is_the_best_in_the_metric_of_magnitudes(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("gpt2")
    calibration = calibrate(model, tmp_path)
    for index, block in enumerate(block_linears(model)):
        for name, layer in block.items():
            weight = weight_of(layer).double().numpy()
            scale = calibration.curvature.magnitudes(index)[name].double().numpy() ** 0.5
            values = np.linalg.svd(weight * scale, compute_uv=False)
            for rank in (1, 7, 20):
                u, v = calibration.factors.load(name, rank)
                error = float((((weight - (u @ v).double().numpy()) * scale) ** 2).sum())
                assert np.isclose(error, (values[rank:] ** 2).sum(), rtol=1e-5)
            assert np.allclose(calibration.factors.energies[name], values**2, rtol=1e-6)


def test_the_budget_is_met_and_low_ranks_are_all_there_is(tiny: Callable[..., Any], tmp_path: Path) -> None:
    calibration = calibrate(tiny("llama"), tmp_path)
    plan = Asvd(0.7, rank_multiple=1, tolerance=0.01, samples=2).allocate(calibration.factors, "fp32", calibration)
    assert abs(plan.ratio - 0.7) <= 0.007
    assert plan.counts()["pivot"] == 0
    assert plan.counts()["lowrank"] > 0
    assert (calibration.folder / "probes_diagonal.json").exists()
    assert all(spec.loss is None for _, spec in plan)  # energies in this metric are no losses
    assert Asvd(0.7).options()["grid"] == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
