"""What figures share: colours of the two themes, text that matplotlib can draw, the same PNG each time."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

DPI = 200


@dataclass(frozen=True)
class Theme:
    """Colours of the page and its figures, `#rrggbb`.

    Args:
        name: `light` or `dark`; part of the file names.
        background: behind everything.
        surface: table heads, dense cells.
        text: text.
        muted: secondary text and marks; at least 4.5:1 on `background` and `surface`.
        rule: lines.
        accent: compressed models, links.
        neutral: the dense model.
    """

    name: str
    background: str
    surface: str
    text: str
    muted: str
    rule: str
    accent: str
    neutral: str


LIGHT = Theme("light", "#ffffff", "#f1f3f5", "#1b1f24", "#535c66", "#d3d9df", "#1d6a87", "#98a2ad")
DARK = Theme("dark", "#14171b", "#20252b", "#e7eaed", "#a3adb7", "#363d45", "#5cb3d1", "#6d7883")
THEMES = (LIGHT, DARK)


def plain(text: str, most: int = 200) -> str:
    """Text for matplotlib: one printable line, shortened in the middle, no formulas in it."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    if len(line) > most:
        line = f"{line[: most // 2]}…{line[-(most // 2 - 1) :]}"
    return line.replace("$", r"\$")


def to_png(draw: Callable[[Theme], Figure], theme: Theme) -> bytes:
    """Draw with matplotlib's own defaults; the same input gives the same bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        buffer = io.BytesIO()
        draw(theme).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
