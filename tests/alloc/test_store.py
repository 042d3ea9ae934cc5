"""Factors on disk are those of every layer by itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rankwise.alloc.curvature import Curvature, collect
from rankwise.alloc.factors import SIDES, factorize, factorize_diagonal
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.anatomy import block_linears, features, weight_of
from rankwise.errors import RankwiseError

CPU = torch.device("cpu")
METRICS = pytest.mark.parametrize("sides", SIDES)


def measure(model: Any, folder: Path, *, gradients: bool = True) -> Curvature:
    windows = torch.randint(2, 512, (4, 24), generator=torch.Generator().manual_seed(1))
    return collect(model, windows[:2], windows[2:] if gradients else None, folder / "curvature", device=CPU)


def make(model: Any, curvature: Curvature, folder: Path, *, sides: str = "two", **options: Any) -> FactorStore:
    return factorize_model(model, curvature, folder / "factors", sides=sides, device=CPU, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@METRICS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layer_is_factored_in_its_own_metric(
    sides: str, family: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(family)
    curvature = measure(model, tmp_path)
    store = make(model, curvature, tmp_path, sides=sides)
    for index, block in enumerate(block_linears(model)):
        inputs, outputs, sizes = curvature.inputs(index), curvature.outputs(index), curvature.magnitudes(index)
        for name, layer in block.items():
            weight = weight_of(layer)
            expected = {
                "one": factorize(weight, inputs[name]),
                "two": factorize(weight, curvature.metric(index)[0][name], outputs[name]),
                "diagonal": factorize_diagonal(weight, sizes[name]),
            }[sides]
            u, v = store.load(name, min(features(layer)))
            assert torch.equal(u, expected.u)
            assert torch.equal(v, expected.v)
            assert np.array_equal(store.energies[name], expected.energy.numpy())
            assert float((u @ v - weight_of(layer)).norm()) < 1e-5 * float(weight_of(layer).norm())


def test_lower_ranks_are_the_head_of_the_full_one(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    store = make(model, measure(model, tmp_path), tmp_path)
    name = "model.layers.1.mlp.down_proj"
    u, v = store.load(name, 32)
    for rank in (1, 7, 31):
        some_u, some_v = store.load(name, rank)
        assert torch.equal(some_u, u[:, :rank])
        assert torch.equal(some_v, v[:rank])
        assert some_u.is_contiguous()


def test_shapes_and_energies_come_in_model_order(family: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny(family)
    store = make(model, measure(model, tmp_path), tmp_path)
    expected = {name: features(layer) for block in block_linears(model) for name, layer in block.items()}
    assert list(store.shapes.items()) == list(expected.items())
    assert list(store.energies) == list(expected)
    for name, energy in store.energies.items():
        assert energy.shape == (min(expected[name]),)
        assert energy.dtype == np.float64
        assert (np.diff(energy) <= 0).all()
        assert energy[-1] >= 0


def test_killed_between_blocks_the_next_run_makes_the_same_bytes(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    curvature = measure(model, tmp_path)
    make(model, curvature, tmp_path / "whole")

    @contextmanager
    def dies(name: str, total: int) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            raise InterruptedError

        yield advance

    with pytest.raises(InterruptedError):
        make(model, curvature, tmp_path / "parts", track=dies)
    assert list(contents(tmp_path / "parts" / "factors")) == ["factors_000.safetensors", "factors.json"]
    first = (tmp_path / "parts" / "factors" / "factors_000.safetensors").stat().st_mtime_ns
    make(model, curvature, tmp_path / "parts")
    assert contents(tmp_path / "parts" / "factors") == contents(tmp_path / "whole" / "factors")
    assert (tmp_path / "parts" / "factors" / "factors_000.safetensors").stat().st_mtime_ns == first


def test_missing_output_moments_are_said(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    curvature = measure(model, tmp_path, gradients=False)
    with pytest.raises(RankwiseError, match="no output-gradient moments"):
        make(model, curvature, tmp_path)
    assert len(make(model, curvature, tmp_path, sides="one").energies) == 14


def test_a_layer_never_called_is_of_unknown_worth(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[0].spare = nn.Linear(32, 16).requires_grad_(False)
    store = make(model, measure(model, tmp_path), tmp_path)
    assert np.isinf(store.energies["model.layers.0.spare"]).all()
    u, v = store.load("model.layers.0.spare", 16)
    assert torch.allclose(u @ v, model.model.layers[0].spare.weight, atol=1e-6)


def test_unusable_moments_name_their_layer(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    curvature = measure(model, tmp_path)
    read = curvature.outputs

    def spoiled(index: int) -> dict[str, torch.Tensor]:
        found = read(index)
        found["model.layers.1.mlp.up_proj"] = -torch.eye(48) * 5
        return found

    curvature.outputs = spoiled  # type: ignore[method-assign]
    with pytest.raises(RankwiseError, match="indefinite") as caught:
        make(model, curvature, tmp_path)
    assert caught.value.field.startswith("model.layers.1.mlp.up_proj: ")
    assert list(contents(tmp_path / "factors")) == ["factors_000.safetensors", "factors.json"]


def test_a_damaged_file_is_named(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    store = make(model, measure(model, tmp_path), tmp_path)
    store.file(1).write_bytes(store.file(1).read_bytes()[:100])
    with pytest.raises(RankwiseError) as caught:
        store.load("model.layers.1.mlp.up_proj", 3)
    assert caught.value.field == str(store.file(1))
