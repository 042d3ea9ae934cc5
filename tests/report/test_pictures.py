"""Captions and the same in words: which pictures there are, and what they say."""

import pytest
from reports import DENSE, TEXT, make_plan

from rankwise.figures import LIGHT
from rankwise.plan import LayerSpec
from rankwise.report.pictures import bar_pictures, map_pictures, tradeoff_pictures


def test_bars_keep_the_place_of_a_model_that_lacks_the_number() -> None:
    rows = [{"name": "a", "perplexity": 20.0}, {"name": "b"}, {"name": "c", "perplexity": 30.0}]
    (picture,) = bar_pictures(rows)
    assert picture.name == "perplexity"
    assert picture.alt == "Perplexity; lower is better. a: 20.00, b: not measured, c: 30.00."
    assert [patch.get_width() for patch in picture.draw(LIGHT).axes[0].patches] == [20.0, 0.0, 30.0]


def test_captions_say_where_settings_differ() -> None:
    rows = [DENSE, DENSE | {"name": "small", "text": None, "device": "NVIDIA H100"}]
    captions = {picture.name: picture.caption for picture in bar_pictures(rows)}
    assert captions["perplexity"] == f"Perplexity; lower is better; settings differ: base: {TEXT}; small: not stated."
    assert "small: NVIDIA H100, prompt of 128 tokens" in captions["prefill"]
    assert captions["size"] == "Size of the weights; smaller is better."
    rows = [{"perplexity": 1.0}, {"perplexity": 2.0}]
    assert bar_pictures(rows)[0].caption == "Perplexity; lower is better; settings not stated."


def test_map_pictures_tell_extremes_and_gaps() -> None:
    plan = make_plan()
    ranks, energies = map_pictures(plan)
    assert "2 module types in 2 blocks; modules left dense: 1." in ranks.alt
    assert "from 50.0% (self_attn.q_proj of block 1) to 75.0% (self_attn.q_proj of block 0)" in ranks.alt
    assert "to 99.99% (self_attn.q_proj of block 1)" in energies.alt
    assert "Crossed out: left dense. Dots: lowrank" in ranks.caption
    layers = dict(list(plan.layers.items())[:3])
    assert map_pictures(make_plan(layers=layers))[0].caption.endswith("Blank: no value.")
    assert map_pictures(make_plan(layers={"head": LayerSpec("dense", 8, 8, 8, energy=1.0)})) == []


SIZED = [
    {"name": "base", "perplexity": 20.0, "weight_bytes": 269e6, "text": TEXT},
    {"name": "runs/a", "perplexity": 30.0, "weight_bytes": 200e6, "text": TEXT},
    {"name": "runs/b", "perplexity": 25.5, "weight_bytes": 110e6, "text": TEXT},
]


def test_tradeoff_says_what_its_points_are() -> None:
    (picture,) = tradeoff_pictures(SIZED)
    assert picture.name == "tradeoff"
    assert picture.caption == (
        f"Perplexity against size of the weights; lower left is better; measured on {TEXT}. "
        "Diamond: base, with which the others are compared."
    )
    assert picture.alt.endswith("base: 269.0 MB, 20.00; runs/a: 200.0 MB, 30.00; runs/b: 110.0 MB, 25.50.")
    axes = picture.draw(LIGHT).axes[0]
    assert axes.get_yscale() == "linear"
    drawn = [tuple(point) for line in axes.lines for point in line.get_xydata()]
    assert sorted(drawn) == [(110.0, 25.5), (200.0, 30.0), (269.0, 20.0)]
    assert [line.get_marker() for line in axes.lines] == ["o", "D"]


def test_tradeoff_is_logarithmic_where_perplexities_lie_far_apart() -> None:
    (picture,) = tradeoff_pictures([*SIZED[:2], {**SIZED[2], "perplexity": 300.0}])
    assert picture.caption.endswith("The scale of the perplexity is logarithmic.")
    assert picture.draw(LIGHT).axes[0].get_yscale() == "log"


@pytest.mark.parametrize("gap", [None, float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["perplexity", "weight_bytes"])
def test_tradeoff_needs_three_models_with_both_numbers(key: str, gap: float | None) -> None:
    lacking = {**SIZED[2], "name": "c", key: gap}
    assert tradeoff_pictures([*SIZED[:2], lacking]) == []
    (picture,) = tradeoff_pictures([*SIZED, lacking])
    assert picture.caption.endswith("Not shown, for want of a number: c.")
    assert "c:" not in picture.alt
    (picture,) = tradeoff_pictures([lacking, *SIZED])  # the first is missing: no diamond
    assert "Diamond" not in picture.caption
    assert [line.get_marker() for line in picture.draw(LIGHT).axes[0].lines] == ["o"]
