"""Bars: one number a model."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from rankwise.figures import Theme, plain

WIDTH = 4.6  # inches; readable when a phone shows the figure 360 px wide


def bars(
    title: str, names: Sequence[str], values: Sequence[float | None], labels: Sequence[str], theme: Theme
) -> Figure:
    """One horizontal bar a model, from zero; the first is the dense one.

    Args:
        title: what is measured, and which end is better.
        names: models, written above their bars.
        values: lengths; None or not finite draws no bar.
        labels: written at the ends of the bars.
        theme: colours.
    """
    figure = Figure(figsize=(WIDTH, 0.75 + 0.58 * len(names)), layout="constrained", facecolor=theme.background)
    axes = figure.add_subplot(facecolor=theme.background)
    lengths = [v if v is not None and np.isfinite(v) else 0.0 for v in values]
    longest = max(lengths) or 1.0
    for place, (name, length, label) in enumerate(zip(names, lengths, labels, strict=True)):
        axes.barh(place, length, height=0.42, color=theme.accent if place else theme.neutral)
        axes.text(0, place - 0.3, plain(name, 44), ha="left", va="bottom", color=theme.text, fontsize=9.5)
        ink = theme.text if length else theme.muted
        axes.text(length + longest * 0.015, place, plain(label), va="center", color=ink, fontsize=9.5)
    axes.set_xlim(0, longest)
    axes.set_ylim(len(names) - 0.65, -0.75)
    axes.set_axis_off()
    axes.set_title(plain(title), loc="left", color=theme.muted, fontsize=9.5)
    return figure
