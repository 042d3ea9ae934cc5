"""Scores on disk: what was learnt is read as it was written, for the model that it was learnt from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.alloc.budget import Choices
from rankwise.alloc.curvature import collect
from rankwise.alloc.learnt import Ordered
from rankwise.alloc.methods import Ara, Global, Llrc
from rankwise.alloc.store import factorize_model
from rankwise.errors import RankwiseError
from rankwise.scores import CHOICES, FACTORS, INDEX, finish_scores, open_scores, require_scores

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """`folder(method, learnt)`: a finished folder of the tiny llama; `learnt` is made from the plain choices."""

    def make(method: Any, learn: Callable[[str, Choices], Choices] | None = None) -> Path:
        model, windows = tiny("llama"), torch.randint(2, 512, (4, 24), generator=torch.Generator().manual_seed(1))
        curvature = collect(model, windows[:2], windows[2:], tmp_path / "curvature", device=CPU)
        store = factorize_model(model, curvature, tmp_path / "scores" / FACTORS, sides="two", device=CPU)
        plain = method.choices(store.shapes, store.energies)
        learnt = None if learn is None else {name: learn(name, entry) for name, entry in plain.items()}
        facts = {"model": "tiny", "options": method.options(), "curvature": curvature.identity}
        finish_scores(tmp_path / "scores", facts, learnt)
        return tmp_path / "scores"

    return make


def ordered(name: str, entry: Choices) -> Ordered:
    """The last components first, in every layer."""
    count = int(entry.rank.max())
    return Ordered(entry.kind, entry.rank, entry.cost, entry.loss / 3, entry.dense_cost, np.arange(count)[::-1].copy())


def equal(a: Choices, b: Choices) -> bool:
    arrays = ("rank", "cost", "loss", *(["order"] if isinstance(a, Ordered) else []))
    same = all(
        np.array_equal(getattr(a, key), getattr(b, key)) and getattr(a, key).dtype == getattr(b, key).dtype
        for key in arrays
    )
    return same and type(a) is type(b) and (a.kind, a.dense_cost) == (b.kind, b.dense_cost)


@pytest.mark.parametrize("learn", [lambda name, entry: entry, ordered], ids=["plain", "ordered"])
def test_what_was_learnt_is_read_as_it_was_written(
    learn: Callable[[str, Choices], Choices], folder: Callable[..., Path], tiny: Callable[..., Any]
) -> None:
    method = Ara(rank_multiple=1)
    scores = open_scores(folder(method, learn), tiny("llama"))
    assert scores.learnt is not None
    assert list(scores.learnt) == list(scores.store.shapes)  # files sort names otherwise; ties go by model order
    plain = method.choices(scores.store.shapes, scores.store.energies)
    for name, entry in scores.learnt.items():
        assert equal(entry, learn(name, plain[name]))
        assert isinstance(entry.dense_cost, int)
        assert all(isinstance(kind, str) for kind in entry.kind)


def test_the_method_comes_back_with_its_options(folder: Callable[..., Path], tiny: Callable[..., Any]) -> None:
    method = Llrc(0.7, kinds=("dense", "lowrank"), rank_multiple=2, steps=9, selection="any-k", after=None)
    scores = open_scores(folder(method, ordered), tiny("llama"))
    assert scores.method() == method
    assert scores.method(ratio=0.5, steps=3).ratio == 0.5
    assert scores.method(ratio=0.5, steps=3).steps == 3


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.95])
def test_plans_of_any_ratio(ratio: float, folder: Callable[..., Path], tiny: Callable[..., Any]) -> None:
    scores = open_scores(folder(Global(0.8, rank_multiple=1)), tiny("llama"))
    assert scores.learnt is None
    plan = scores.allocate(ratio, "fp32")
    assert plan.ratio == pytest.approx(ratio, rel=1e-3)
    assert plan.layers == Global(ratio, rank_multiple=1).allocate(scores.store, "fp32").layers
    with pytest.raises(RankwiseError, match=r"^ratio: "):
        scores.allocate(0.001, "fp32")


def test_learnt_losses_decide(folder: Callable[..., Path], tiny: Callable[..., Any]) -> None:
    """A layer whose losses were learnt to be large keeps its parameters."""
    dear = "model.layers.1.mlp.up_proj"

    def learn(name: str, entry: Choices) -> Choices:
        return Choices(entry.kind, entry.rank, entry.cost, entry.loss * (1e6 if name == dear else 1), entry.dense_cost)

    scores = open_scores(folder(Ara(0.5, rank_multiple=1), learn), tiny("llama"))
    plan = scores.allocate(0.5, "fp32")
    assert plan.ratio == pytest.approx(0.5, rel=1e-3)
    assert plan.layers[dear].ratio > 0.9
    assert Global(0.5, rank_multiple=1).allocate(scores.store).layers[dear].ratio < 0.9


def test_any_components_come_back_as_indices(folder: Callable[..., Path], tiny: Callable[..., Any]) -> None:
    method = Llrc(0.5, kinds=("lowrank",), rank_multiple=1, selection="any-k")
    plan = open_scores(folder(method, ordered), tiny("llama")).allocate(0.5, "fp32")
    spec = plan.layers["model.layers.0.mlp.up_proj"]
    assert spec.indices is not None
    assert len(spec.indices) == spec.rank
    assert spec.indices[0] > 0


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"seed": 1}, {"dtype": torch.bfloat16}], ids=["weights", "dtype"])
def test_scores_of_another_model_are_refused(
    other: dict[str, Any], folder: Callable[..., Path], tiny: Callable[..., Any]
) -> None:
    made = folder(Global())
    with pytest.raises(RankwiseError, match=r"^scores: .* was made from tiny, in other weights or another dtype; the"):
        open_scores(made, tiny("llama", **other))


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    for name in ("none", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        with pytest.raises(RankwiseError, match=rf"^scores: .*{name} \(no scores.json in it\); a folder written with"):
            require_scores(tmp_path / name)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 2}', "7"])
def test_other_formats_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(RankwiseError, match=r"^scores: .*scores.json: format (None|2); this version reads format 1$"):
        require_scores(tmp_path)


def test_missing_parts_are_named(folder: Callable[..., Path], tiny: Callable[..., Any]) -> None:
    made = folder(Ara(rank_multiple=1), lambda name, entry: entry)
    assert json.loads((made / INDEX).read_text())["learnt"] is True
    (made / CHOICES).rename(made / "other")
    with pytest.raises(RankwiseError, match=r"choices.safetensors: no such file; the folder is incomplete"):
        open_scores(made, tiny("llama"))
    (made / "other").rename(made / CHOICES)
    (made / FACTORS / "factors_001.safetensors").unlink()
    with pytest.raises(RankwiseError, match=r"factors_001.safetensors: no such file; the folder is incomplete"):
        open_scores(made, tiny("llama")).allocate(0.5, "fp32")
