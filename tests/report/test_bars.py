"""Bars: one number a model."""

import pytest
from matplotlib.colors import to_rgb
from reports import texts

from rankwise.figures import DARK, LIGHT
from rankwise.report.bars import bars


def test_bars_are_as_long_as_their_values() -> None:
    figure = bars("t", ["dense", "small", "other"], [20.0, None, 25.0], ["20.00", "not measured", "25.00"], LIGHT)
    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches] == [20.0, 0.0, 25.0]
    assert axes.get_xlim()[0] == 0
    labels = {t.get_text(): t for t in axes.texts}
    assert set(labels) == {"dense", "small", "other", "20.00", "not measured", "25.00"}
    assert labels["not measured"].get_color() == LIGHT.muted
    assert [to_rgb(p.get_facecolor()) for p in axes.patches] == [
        to_rgb(c) for c in (LIGHT.neutral, LIGHT.accent, LIGHT.accent)
    ]


@pytest.mark.parametrize("name", ["$\\nosuch{1}$", "a" * 500, "two\nlines\x00", "models/" * 9])
def test_any_name_can_be_drawn_inside_the_figure(name: str) -> None:
    figure = bars("t", [name, "b"], [1.0, 2.0], ["16,000.00 GB", "not measured"], DARK)
    for text in texts(figure):
        assert text.get_window_extent().x1 <= figure.bbox.x1, text.get_text()
