"""What all methods that train masks promise: exact budgets whatever was learnt, and the same plan after a kill."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.alloc.methods import METHODS, Ara, Ars, Dobi, Global, Llrc, trained
from rankwise.alloc.methods.trained import Trained
from rankwise.errors import RankwiseError
from rankwise.files import read_tensors
from rankwise.plan import KINDS

LEARNERS = [method for method in METHODS.values() if issubclass(method, Trained)]
LEARNER_CLASSES = [pytest.param(method, id=method.name) for method in LEARNERS]
SHORT: dict[str, Any] = {"steps": 6, "train_len": 16, "save_every": 2, "rank_multiple": 1, "tolerance": 0.02}
VARIANTS = [
    pytest.param(Ara, {}, id="ara"),
    pytest.param(Ara, {"faithful": True}, id="ara-faithful"),
    pytest.param(Ara, {"kinds": ("dense", "lowrank"), "rescale": "weighted"}, id="ara-lowrank"),
    pytest.param(Ara, {"parametrisation": "gumbel", "start": "global"}, id="ara-gumbel"),
    pytest.param(Llrc, {}, id="llrc"),
    pytest.param(Llrc, {"selection": "top-k", "start": "uniform", "after": 2}, id="llrc-top-k"),
    pytest.param(Ars, {}, id="ars"),
    pytest.param(Dobi, {}, id="dobi"),
]


def scores(shapes: list[tuple[int, int]], seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(len(shapes))]
    energies = [np.sort(random.exponential(10 ** random.uniform(-2, 2), min(s)))[::-1] for s in shapes]
    known = dict(zip(names, shapes, strict=True))
    return SimpleNamespace(shapes=known, originals=known, removed={}, energies=dict(zip(names, energies, strict=True)))


CALIBRATION: Any = SimpleNamespace(seed=0, curvature=SimpleNamespace(identity={}))


@contextmanager
def anything_learnt(seed: int, scale: float) -> Iterator[None]:
    """Training that leaves the parameters anywhere."""

    def scatter(bank: Any, *rest: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in bank.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "train", scatter)
        yield


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(LEARNERS),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True).map(tuple),
    st.floats(0.05, 1),
    st.sampled_from([1, 1, 2, 8]),
    st.sampled_from(["proportional", "weighted"]),
    st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    st.integers(0, 99),
)
def test_whatever_was_learnt_the_budget_is_met(
    method: type[Trained],
    shapes: list[tuple[int, int]],
    kinds: tuple[str, ...],
    ratio: float,
    multiple: int,
    rescale: str,
    scale: float,
    seed: int,
) -> None:
    chosen = method(ratio, kinds, multiple, tolerance=0.05, rescale=rescale)
    try:
        with anything_learnt(seed, scale):
            plan = chosen.allocate(scores(shapes, seed), calibration=CALIBRATION)
        refused = ""
    except RankwiseError as error:
        refused = error.field
    if refused:
        assert refused in ("ratio", "rank_multiple", "shares")  # the last: nothing is wanted of any layer
        return
    assert abs(plan.ratio - ratio) <= 0.05 * ratio * (1 + 1e-9)
    for _, spec in plan:
        assert spec.kind in kinds
        assert spec.parameters <= spec.dense_parameters
        assert spec.kind == "dense" or spec.rank % multiple == 0
        assert spec.energy is None or -1e-9 <= spec.energy <= 1 + 1e-9


BLOCKS = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)] * 3


@pytest.mark.parametrize("method", LEARNER_CLASSES)
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("kinds", [KINDS, ("dense", "lowrank"), ("pivot",)], ids="+".join)
def test_ordinary_budgets_are_met_exactly(method: type[Trained], ratio: float, kinds: tuple[str, ...]) -> None:
    with anything_learnt(1, 1.0):
        plan = method(ratio, kinds, 1).allocate(scores(BLOCKS), calibration=CALIBRATION)
    assert abs(plan.ratio - ratio) <= 0.001 * ratio


@pytest.mark.parametrize("method", LEARNER_CLASSES)
def test_layers_that_can_only_stay_as_they_are_do_so(method: type[Trained]) -> None:
    mixed = scores([(64, 64), (4, 64), (64, 64)])  # no multiple of 8 fits below the second one's rank
    with anything_learnt(2, 1.0):
        plan = method(0.6, tolerance=0.05).allocate(mixed, calibration=CALIBRATION)
    assert plan.layers["layer1"].kind == "dense"
    with anything_learnt(2, 1.0):
        assert method(1.0, ("dense",)).allocate(mixed, calibration=CALIBRATION).counts()["dense"] == 3


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_a_killed_training_ends_in_the_same_plan(
    method: type[Trained], options: dict[str, Any], bench: Any, dies: Any, tmp_path: Path
) -> None:
    chosen = method(0.6, **(SHORT | options))
    store = bench.stores[chosen.sides]
    calibration = [bench.calibration(tmp_path / name, chosen.sides) for name in ("whole", "killed")]
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    whole = chosen.allocate(store, "fp32", calibration[0])
    with pytest.raises(InterruptedError):
        chosen.allocate(store, "fp32", bench.calibration(tmp_path / "killed", chosen.sides, track=dies(2)))
    resumed = chosen.allocate(store, "fp32", calibration[1])
    assert resumed.to_dict() == whole.to_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in bench.model.state_dict().items())
    masks = [read_tensors(tmp_path / name / "masks.safetensors") for name in ("whole", "killed")]
    assert masks[0].keys() == set(store.shapes)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert whole.ratio == pytest.approx(0.6, rel=0.02 if chosen.exact else 0.3)


def test_other_options_do_not_continue_a_training(bench: Any, dies: Any, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        Ara(0.6, **SHORT).allocate(bench.stores["two"], "fp32", bench.calibration(tmp_path, track=dies(4)))
    with pytest.raises(RankwiseError, match="was made with other lambda1"):
        Ara(0.6, lambda1=5.0, **SHORT).allocate(bench.stores["two"], "fp32", bench.calibration(tmp_path))


# --- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [KINDS, ("dense", "lowrank")], ids="+".join)
def test_training_may_start_from_the_closed_form_plan(kinds: tuple[str, ...]) -> None:
    layers = scores(BLOCKS)
    with anything_learnt(0, 0.0):
        plan = Ara(0.6, kinds, 1, start="global", rescale="weighted").allocate(layers, calibration=CALIBRATION)
    expected = Global(0.6, kinds, 1).allocate(layers)
    ranks = np.array([[spec.rank, expected.layers[name].rank] for name, spec in plan])
    assert np.abs(ranks[:, 0] - ranks[:, 1]).max() <= 2  # dense from a share of 0.99
    assert len(set(ranks[:, 1])) > 5


def test_training_starts_every_layer_at_the_ratio_by_itself() -> None:
    with anything_learnt(0, 0.0):
        plan = Ara(0.6, ("pivot",), 1).allocate(scores(BLOCKS), calibration=CALIBRATION)
    assert all(spec.ratio == pytest.approx(0.6, abs=0.06) for _, spec in plan)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LEARNER_CLASSES)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("train_len", 1),
        ("batch", 0),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("lr", "fast"),
        ("start", "elsewhere"),
        ("rescale", "none"),
        ("save_every", 0),
        ("sides", "three"),
    ],
)
def test_bad_options_are_named(method: type[Trained], option: str, value: Any) -> None:
    with pytest.raises(RankwiseError, match="allowed: ") as caught:
        method(**{option: value})
    assert caught.value.field == option


@pytest.mark.parametrize(
    ("method", "steps", "rate"),
    [
        (Ara, 400, 6.4e-3),
        (Ara, 2560, 1e-3),
        (Llrc, 600, 5e-2),
        (Llrc, 3000, 1e-2),
        (Llrc, 60, 0.1),
        (Ars, 400, 1e-3 * 31.25**0.5),
        (Dobi, 400, 4 * 5 / 4096),
        (Dobi, 5120, 5 / 4096),
    ],
)
def test_rates_grow_as_steps_get_fewer(method: type[Trained], steps: int, rate: float) -> None:
    assert method(steps=steps).rate == pytest.approx(rate)
    assert method(steps=steps, lr=0.5).rate == 0.5
