"""What figures share: colours, and the same PNG each time."""

import io

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from reports import contrast

from rankwise.figures import DARK, LIGHT, THEMES, Theme, to_png
from rankwise.report.bars import bars

THEME_IDS = [theme.name for theme in THEMES]


def test_png_is_the_same_each_time_and_whatever_the_user_configured() -> None:
    def draw(theme: Theme) -> Figure:
        return bars("t", ["a", "b"], [1.0, 2.0], ["1", "2"], theme)

    first = to_png(draw, LIGHT)
    with matplotlib.rc_context({"font.size": 30, "savefig.facecolor": "red", "savefig.bbox": "tight"}):
        assert to_png(draw, LIGHT) == first
        assert matplotlib.rcParams["font.size"] == 30
    image = Image.open(io.BytesIO(first))
    assert set(image.info) <= {"dpi"}
    assert image.convert("RGB").getpixel((0, 0)) == tuple(round(255 * c) for c in to_rgb(LIGHT.background))
    assert to_png(draw, DARK) != first


@pytest.mark.parametrize("theme", THEMES, ids=THEME_IDS)
def test_text_colours_are_legible(theme: Theme) -> None:
    for ink in (theme.text, theme.muted, theme.accent):
        for paper in (theme.background, theme.surface):
            assert contrast(ink, paper) >= 4.5, (ink, paper)
