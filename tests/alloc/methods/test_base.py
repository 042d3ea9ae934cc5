"""What all methods promise: exact budgets, nothing larger than dense, clear refusals."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import Whole

from rankwise.alloc.methods import METHODS, Global, Method, Uniform, method_by_name
from rankwise.errors import RankwiseError
from rankwise.plan import KINDS, LayerSpec

METHOD_CLASSES = [pytest.param(method, id=method.name) for method in METHODS.values()]
CLOSED_FORM = [method for method in METHODS.values() if not method.learns]
CLOSED_FORM_CLASSES = [pytest.param(method, id=method.name) for method in CLOSED_FORM]


@dataclass
class Spectra(Whole):
    """Shapes and energies, as a store of factors has them."""

    shapes: dict[str, tuple[int, int]]
    energies: dict[str, np.ndarray]

    @classmethod
    def draw(cls, shapes: list[tuple[int, int]], seed: int = 0) -> "Spectra":
        """Falling spectra of different scale and slope."""
        random = np.random.default_rng(seed)
        energies = [
            np.sort(random.exponential(10 ** random.uniform(-2, 2), min(shape)))[::-1] ** random.uniform(1, 3)
            for shape in shapes
        ]
        names = [f"layer{i}" for i in range(len(shapes))]
        return cls(dict(zip(names, shapes, strict=True)), dict(zip(names, energies, strict=True)))

    @property
    def total(self) -> int:
        return sum(m * n for m, n in self.shapes.values())


BLOCKS = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)] * 2


def parameters(kind: str, rank: int, m: int, n: int) -> int:
    return {"dense": m * n, "lowrank": rank * (m + n), "pivot": rank * (m + n) - rank * rank}[kind]


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CLOSED_FORM_CLASSES)
@pytest.mark.parametrize("kinds", [KINDS, ("dense", "lowrank"), ("pivot",)], ids="+".join)
@pytest.mark.parametrize("sides", ["one", "two", "diagonal"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 0.95])
def test_ordinary_budgets_are_met_exactly(
    method: type[Method], kinds: tuple[str, ...], sides: str, ratio: float
) -> None:
    scores = Spectra.draw(BLOCKS)
    plan = method(ratio, kinds, rank_multiple=1, sides=sides).allocate(scores)
    used = sum(parameters(s.kind, s.rank, s.out_features, s.in_features) for _, s in plan)
    assert abs(used / scores.total - ratio) <= 0.001 * ratio
    assert plan.ratio == used / scores.total
    assert list(plan.layers) == list(scores.shapes)
    assert {name: (s.out_features, s.in_features) for name, s in plan} == scores.shapes


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)
some_kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True).map(tuple)


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(CLOSED_FORM),
    shapes,
    some_kinds,
    st.floats(0.02, 1),
    st.sampled_from([1, 1, 2, 3, 8]),
    st.sampled_from([0.001, 0.01, 0.1]),
    st.sampled_from(["one", "two"]),
    st.sampled_from(["plain", "zero", "unseen", "steep"]),
    st.integers(0, 99),
)
def test_a_plan_keeps_its_promises_or_is_refused(
    method: type[Method],
    shapes: list[tuple[int, int]],
    kinds: tuple[str, ...],
    ratio: float,
    multiple: int,
    tolerance: float,
    sides: str,
    spectrum: str,
    seed: int,
) -> None:
    scores = Spectra.draw(shapes, seed)
    if spectrum != "plain":
        first = scores.energies["layer0"]
        scores.energies["layer0"] = {
            "zero": np.zeros_like(first),
            "unseen": np.full_like(first, np.inf),
            "steep": np.logspace(15, -15, len(first)),
        }[spectrum]
    try:
        plan = method(ratio, kinds, multiple, tolerance, sides).allocate(scores)
    except RankwiseError as error:
        refused = error.field
    else:
        refused = ""
    if refused:
        assert refused in ("ratio", "rank_multiple")
        return
    assert abs(plan.ratio - ratio) <= tolerance * ratio * (1 + 1e-9)
    for _, spec in plan:
        assert spec.kind in kinds
        assert spec.parameters <= spec.dense_parameters
        assert spec.kind == "dense" or spec.rank % multiple == 0
        assert spec.energy is None or -1e-9 <= spec.energy <= 1 + 1e-9
        assert spec.loss is None or spec.loss >= 0


@pytest.mark.parametrize("method", METHOD_CLASSES)
@pytest.mark.parametrize(
    ("kinds", "ratio", "lowest", "highest"),
    [  # one layer of 8 x 8: pivots hold 15 to 63 of 64 numbers, low ranks 16 to 48 (rank 4 would be as large as dense)
        pytest.param(("pivot",), 0.2, "0.2344", "0.9844", id="pivot-too-low"),
        pytest.param(("pivot",), 1.0, "0.2344", "0.9844", id="pivot-too-high"),
        pytest.param(("lowrank",), 0.8, "0.25", "0.75", id="lowrank-too-high"),
        pytest.param(("dense",), 0.5, "1", "1", id="dense-alone"),
        pytest.param(KINDS, 0.1, "0.2344", "1", id="all-too-low"),
    ],
)
def test_budgets_out_of_reach_say_what_is_in_reach(
    method: type[Method], kinds: tuple[str, ...], ratio: float, lowest: str, highest: str
) -> None:
    with pytest.raises(RankwiseError) as caught:
        method(ratio, kinds, 1).allocate(Spectra.draw([(8, 8)]))
    assert caught.value.field == "ratio"
    assert str(caught.value).startswith(f"ratio: {ratio:.4g}; ")
    assert str(caught.value).endswith(f" reach {lowest} to {highest}")


@pytest.mark.parametrize("method", CLOSED_FORM_CLASSES)
def test_budgets_between_the_steps_say_what_is_near(method: type[Method]) -> None:
    scores = Spectra.draw([(8, 8)])  # ranks 1 to 7: 15, 28, 39, 48, 55, 60, 63 of 64
    with pytest.raises(RankwiseError, match=r"ratio: 0\.7; .* 0\.6094; .*--rank-multiple or a larger --tolerance"):
        method(0.7, ("pivot",), 1).allocate(scores)
    assert method(0.7, ("pivot",), 1, tolerance=0.15).allocate(scores).parameters == 39


@pytest.mark.parametrize("method", METHOD_CLASSES)
def test_a_rank_multiple_beyond_every_rank_is_named(method: type[Method]) -> None:
    with pytest.raises(RankwiseError, match=r"rank_multiple: 64; too large for layer0"):
        method(0.5, ("lowrank", "pivot"), 64).allocate(Spectra.draw([(32, 32)]))


@pytest.mark.parametrize("method", CLOSED_FORM_CLASSES)
def test_ratio_one_keeps_everything(method: type[Method]) -> None:
    plan = method(1.0).allocate(Spectra.draw(BLOCKS))
    assert plan.counts() == {"dense": 14, "lowrank": 0, "pivot": 0}
    assert plan.ratio == 1


@pytest.mark.parametrize("method", CLOSED_FORM_CLASSES)
@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_ranks_are_multiples(method: type[Method], multiple: int) -> None:
    plan = method(0.6, ("pivot",), multiple, tolerance=0.05).allocate(
        Spectra.draw([(64, 64), (128, 64), (64, 128)] * 3)
    )
    assert all(spec.rank % multiple == 0 for _, spec in plan)
    assert len({spec.rank for _, spec in plan}) > 1


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_weights_are_written_into_every_layer(weights: str) -> None:
    plan = Global(0.6, rank_multiple=1).allocate(Spectra.draw(BLOCKS), weights)
    assert {spec.weights for _, spec in plan} == {weights}


# --- what is written beside a rank ------------------------------------------------------------------------------------


def one_layer(energy: list[float]) -> Spectra:
    return Spectra({"a": (6, 4)}, {"a": np.array(energy)})


@pytest.mark.parametrize(
    ("sides", "kind", "rank", "kept", "loss"),
    [
        ("two", "pivot", 2, 0.7, 1.5),  # 3 of 10 are lost; half of it is the predicted loss
        ("two", "lowrank", 1, 0.4, 3.0),
        ("two", "dense", 4, 1.0, 0.0),
        ("one", "pivot", 2, 0.7, None),  # in the metric of the inputs alone nothing is known of the loss
    ],
)
def test_kept_energy_and_predicted_loss(sides: str, kind: str, rank: int, kept: float, loss: float | None) -> None:
    spec = Global(sides=sides).spec("a", kind, rank, one_layer([4, 3, 2, 1]), "fp32")
    assert spec == LayerSpec(kind, 6, 4, rank, "fp32", energy=spec.energy, loss=loss)
    assert spec.energy == pytest.approx(kept)


@pytest.mark.parametrize("energy", [[np.inf] * 4, [0.0] * 4], ids=["unseen", "zero"])
def test_unknown_worth_is_said_to_be_unknown(energy: list[float]) -> None:
    spec = Global().spec("a", "pivot", 2, one_layer(energy), "bf16")
    assert (spec.energy, spec.loss) == (None, None)


def test_layers_that_the_model_lacks_are_named() -> None:
    with pytest.raises(RankwiseError, match="b: no such module"):
        Global().spec("b", "dense", 4, one_layer([4, 3, 2, 1]), "bf16")


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_CLASSES)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ratio", 0),
        ("ratio", 1.1),
        ("ratio", float("nan")),
        ("ratio", "0.8"),
        ("tolerance", 0),
        ("tolerance", -1),
        ("rank_multiple", 0),
        ("rank_multiple", 1.5),
        ("kinds", ()),
        ("kinds", ("dense", "svd")),
        ("kinds", "pivot"),
        ("sides", "three"),
        ("sides", ""),
    ],
)
def test_bad_options_are_named(method: type[Method], option: str, value: Any) -> None:
    with pytest.raises(RankwiseError, match="allowed: ") as caught:
        method(**{option: value})
    assert caught.value.field == option


def test_sides_default_to_the_methods_own() -> None:
    assert Global().two_sided
    assert not Uniform().two_sided
    assert not Global(sides="one").two_sided
    assert Uniform(sides="two").two_sided


@pytest.mark.parametrize("method", METHOD_CLASSES)
def test_options_survive_json_and_make_the_same_method(method: type[Method]) -> None:
    chosen = method(0.7, ("dense", "pivot"), 4, 0.01, "one")
    options = chosen.options()
    again = json.loads(json.dumps(options))
    assert again == options
    name = again.pop("method")
    assert method_by_name(name)(**again | {"kinds": tuple(again["kinds"])}) == chosen


def test_unknown_methods_list_the_known_ones() -> None:
    assert method_by_name("global") is Global
    with pytest.raises(RankwiseError, match=f"method: guess; allowed: {', '.join(sorted(METHODS))}$"):
        method_by_name("guess")


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.learns])
def test_methods_that_learn_need_a_model(method: type[Method]) -> None:
    with pytest.raises(RankwiseError, match=f"method: {method.name}; .*needs a calibration"):
        method(0.5, ("dense", "pivot"), 1).allocate(Spectra.draw(BLOCKS))
