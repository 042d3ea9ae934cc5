"""Plans are plain data: formulas, JSON, hand edits, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import RankwiseError
from rankwise.plan import LayerSpec, RankPlan, check_format, layer_parameters
from rankwise.storage import Precision


def example() -> RankPlan:
    layers = {
        "b.0.q": LayerSpec("pivot", 6, 4, 2, "bf16", energy=0.9, loss=0.125),
        "b.0.k": LayerSpec("lowrank", 6, 4, 2, "fp32", energy=0.1 + 0.2, loss=1e-300),
        "b.0.v": LayerSpec("dense", 6, 4, 4, "fp16"),
    }
    return RankPlan(layers, 1000, {"model": "a/b", "measured": {"dense": 22.88}})


# m = 6, n = 4, k = 2: dense 24; lowrank 2·(6 + 4) = 20; pivot 2·4 + (6 - 2)·2 = 16 and six indices of 4 bytes
@pytest.mark.parametrize(
    ("kind", "rank", "weights", "parameters", "size"),
    [
        ("dense", 4, "bf16", 24, 48),
        ("dense", 4, "fp32", 24, 96),
        ("lowrank", 2, "bf16", 20, 40),
        ("lowrank", 2, "fp16", 20, 40),
        ("pivot", 2, "bf16", 16, 56),
        ("pivot", 3, "fp32", 21, 108),
    ],
)
def test_parameters_and_bytes_by_hand(kind: str, rank: int, weights: str, parameters: int, size: int) -> None:
    spec = LayerSpec(kind, 6, 4, rank, weights)
    assert (spec.parameters, spec.bytes) == (parameters, size)
    assert spec.ratio == parameters / 24


def test_totals_by_hand() -> None:
    plan = example()
    assert plan.parameters == 16 + 20 + 24
    assert plan.dense_parameters == 72
    assert plan.ratio == 60 / 72
    assert plan.bytes == 56 + 80 + 48
    assert plan.total_bytes == 1184
    assert list(plan.compressed) == ["b.0.q", "b.0.k"]
    assert plan.counts() == {"dense": 1, "lowrank": 1, "pivot": 1}


@given(st.data(), st.integers(2, 200), st.integers(2, 200))
def test_parameters_count_the_numbers_of_the_tensors(data: st.DataObject, m: int, n: int) -> None:
    k = data.draw(st.integers(1, min(m, n) - 1))
    lowrank = [torch.empty(m, k, device="meta"), torch.empty(k, n, device="meta")]
    pivot = [torch.empty(k, n, device="meta"), torch.empty(m - k, k, device="meta")]
    assert layer_parameters("lowrank", k, m, n) == sum(t.numel() for t in lowrank)
    assert layer_parameters("pivot", k, m, n) == sum(t.numel() for t in pivot) < m * n


def test_json_round_trip_keeps_every_number(tmp_path: Path) -> None:
    plan = example()
    plan.save(tmp_path / "plan.json")
    again = RankPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert list(again.layers) == list(plan.layers)
    assert (again.other_bytes, again.provenance) == (1000, {"model": "a/b", "measured": {"dense": 22.88}})
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_optional_fields_are_written_only_where_they_are_set(tmp_path: Path) -> None:
    """So plans in 16 bits are what they were, byte for byte, and plans of before are read."""
    plan = RankPlan({"a": LayerSpec("pivot", 128, 128, 64, "fp32")})
    old = {"kind", "out_features", "in_features", "rank", "weights", "energy", "loss"}
    assert plan.to_dict()["layers"]["a"].keys() == old
    rounded = plan.stored_as(Precision("int4", 64))
    assert rounded.to_dict()["layers"]["a"].keys() == old | {"group"}
    zeros = plan.stored_as(Precision("int4", 32, True))
    assert zeros.to_dict()["layers"]["a"].keys() == old | {"group", "asymmetric"}
    assert plan.stored_as(Precision("nf4")).to_dict()["layers"]["a"].keys() == old
    for each in (plan, rounded, zeros):
        each.save(tmp_path / "plan.json")
        assert RankPlan.load(tmp_path / "plan.json") == each


def test_a_plan_in_another_precision() -> None:
    layers = {"a": LayerSpec("dense", 128, 128, 128), "b": LayerSpec("lowrank", 128, 128, 64)}
    plan = RankPlan(layers, 10, {"model": "m"}, factors=object())
    rounded = plan.stored_as(Precision("int4", 64))
    assert (plan.quantised, rounded.quantised) == (False, True)
    assert (list(plan.compressed), list(rounded.compressed)) == (["b"], ["a", "b"])
    assert (plan.bits, rounded.bits) == (16, 4.25)
    assert rounded.ratio == plan.ratio
    assert (rounded.other_bytes, rounded.provenance, rounded.factors) == (10, {"model": "m"}, plan.factors)
    assert rounded.stored_as(Precision("bf16")) == plan
    with pytest.raises(RankwiseError, match=r"^b\.group: 128; 128 does not divide rank 64"):
        plan.stored_as(Precision("int4", 128))


def test_factors_stay_in_memory(tmp_path: Path) -> None:
    plan = example()
    plan.factors = object()
    plan.save(tmp_path / "plan.json")
    assert "factors" not in json.loads((tmp_path / "plan.json").read_text())
    assert RankPlan.load(tmp_path / "plan.json").factors is None


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_perplexity_beyond_all_bounds_does_not_lose_the_plan(value: float, tmp_path: Path) -> None:
    plan = example()
    plan.provenance["measured"] = {"dense": 22.88, "compressed": value}
    plan.save(tmp_path / "plan.json")
    strict = json.loads((tmp_path / "plan.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert strict["provenance"]["measured"] == {"dense": 22.88, "compressed": None}
    assert RankPlan.load(tmp_path / "plan.json").layers == plan.layers


def test_hand_edits_are_read(tmp_path: Path) -> None:
    data = example().to_dict()
    data["layers"]["b.0.q"] = {"kind": "lowrank", "out_features": 6, "in_features": 4, "rank": 1}  # options left out
    data["ratio"] = "whatever"  # derived, so not believed
    del data["provenance"], data["other_bytes"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    plan = RankPlan.load(tmp_path / "plan.json")
    assert plan.layers["b.0.q"] == LayerSpec("lowrank", 6, 4, 1, "bf16", None, None)
    assert plan.ratio == (10 + 20 + 24) / 72
    assert (plan.other_bytes, plan.provenance) == (0, {})


@pytest.mark.parametrize(
    ("change", "field", "value", "allowed"),
    [
        pytest.param({"kind": "svd"}, "kind", "svd", "dense, lowrank, pivot", id="kind"),
        pytest.param({"kind": None}, "kind", None, "dense, lowrank, pivot", id="kind-none"),
        pytest.param({"weights": "int3"}, "weights", "int3", "bf16, fp16, fp32", id="weights"),
        pytest.param({"rank": 0}, "rank", 0, "whole number from 1", id="rank-zero"),
        pytest.param({"rank": 2.0}, "rank", 2.0, "whole number from 1", id="rank-float"),
        pytest.param({"rank": "2"}, "rank", "2", "whole number from 1", id="rank-text"),
        pytest.param({"rank": True}, "rank", True, "whole number from 1", id="rank-bool"),
        pytest.param({"rank": 5}, "rank", 5, "1 to 4", id="rank-above-full"),
        pytest.param({"rank": 4}, "rank", 4, "1 to 3", id="pivot-as-large-as-dense"),
        pytest.param({"kind": "lowrank", "rank": 3}, "rank", 3, "1 to 2", id="lowrank-larger-than-dense"),
        pytest.param({"out_features": 0}, "out_features", 0, "whole number from 1", id="out-features"),
        pytest.param({"in_features": -4}, "in_features", -4, "whole number from 1", id="in-features"),
        pytest.param({"energy": "much"}, "energy", "much", "", id="energy-text"),
        pytest.param({"energy": float("nan")}, "energy", None, "", id="energy-nan"),
        pytest.param({"loss": [0.1]}, "loss", [0.1], "", id="loss-list"),
    ],
)
def test_bad_values_name_layer_field_and_what_is_allowed(
    change: dict[str, Any], field: str, value: Any, allowed: str, tmp_path: Path
) -> None:
    data = example().to_dict()
    data["layers"]["b.0.q"] |= change
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(RankwiseError) as caught:
        RankPlan.load(tmp_path / "plan.json")
    assert caught.value.field == f"{tmp_path / 'plan.json'}: b.0.q.{field}"
    assert allowed in caught.value.allowed
    if value is not None:
        assert caught.value.value == value


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"bits": 4}, id="unknown-field"),
        pytest.param({"weights": ["bf16"]}, id="unhashable-weights"),
    ],
)
def test_strange_layers_name_the_layer(change: dict[str, Any]) -> None:
    data = example().to_dict()
    data["layers"]["b.0.q"] |= change
    with pytest.raises(RankwiseError, match=r"mine: b\.0\.q"):
        RankPlan.from_dict(data, "mine")


@pytest.mark.parametrize("entry", [None, 3, ["pivot", 6, 4, 2], {}, {"kind": "pivot"}])
def test_layers_that_are_no_specs_name_the_layer(entry: Any) -> None:
    data = example().to_dict()
    data["layers"]["b.0.q"] = entry
    with pytest.raises(RankwiseError, match=r"mine: b\.0\.q"):
        RankPlan.from_dict(data, "mine")


@pytest.mark.parametrize("data", [None, [], "plan", {}, {"layers": {}}, {"layers": []}, {"format": 1}])
def test_files_without_layers_are_no_plans(data: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(RankwiseError, match="no layers in it"):
        RankPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"other_bytes": "many"}, id="other-bytes-text"),
        pytest.param({"other_bytes": [1]}, id="other-bytes-list"),
        pytest.param({"provenance": ["a/b"]}, id="provenance-list"),
        pytest.param({"provenance": "a/b"}, id="provenance-text"),
    ],
)
def test_bad_values_beside_the_layers_are_refused_too(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(example().to_dict() | change))
    with pytest.raises(RankwiseError, match=next(iter(change))):
        RankPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        pytest.param(2, "upgrade rankwise", id="newer"),
        pytest.param(0, "write it again", id="older"),
        pytest.param(None, "write it again", id="missing"),
        pytest.param("1", "write it again", id="text"),
    ],
)
def test_other_formats_say_what_to_do(found: Any, hint: str) -> None:
    with pytest.raises(RankwiseError, match=hint) as caught:
        RankPlan.from_dict(example().to_dict() | {"format": found}, "mine")
    assert caught.value.field == "mine"
    check_format(1, "mine")


@pytest.mark.parametrize("content", ["", "{", "\xff", '{"layers": '])
def test_files_that_are_no_json_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RankwiseError, match=r"plan\.json"):
        RankPlan.load(tmp_path / "plan.json")


def test_lowrank_may_be_as_large_as_dense_and_no_larger() -> None:
    assert LayerSpec("lowrank", 8, 8, 4).parameters == 64
    with pytest.raises(RankwiseError, match="larger than dense"):
        LayerSpec("lowrank", 8, 8, 5)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (7, 1)])
def test_vectors_have_no_pivot_form(m: int, n: int) -> None:
    with pytest.raises(RankwiseError, match="as large as dense"):
        LayerSpec("pivot", m, n, 1)
