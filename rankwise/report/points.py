"""Perplexity against size: a point a model, its name beside it where there is room."""

import math
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, BboxBase

from rankwise.figures import DPI, Theme, plain

WIDTH, HEIGHT = 4.6, 3.5  # inches; readable when a phone shows the figure 360 px wide
LOG_FROM = 4.0  # largest by smallest perplexity from which their axis is logarithmic
LONGEST = 30  # characters of a name
NEAR, STEP, RINGS = 7.0, 11.0, 8  # points: how far names may stand from their marks
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
STEPS = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten
MARK = 11.0  # points: room that a mark takes


def points(names: Sequence[str], sizes: Sequence[float], values: Sequence[float], first: bool, theme: Theme) -> Figure:
    """One mark a model: perplexity (up) against size (right).

    Args:
        names: models; paths are shortened to their last part where that is enough to tell them apart.
        sizes: bytes, finite.
        values: perplexities, finite.
        first: the first model is the one that others are compared with, and gets a mark of its own.
        theme: colours.
    """
    height = HEIGHT + 0.12 * max(0, len(names) - 8)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")  # letters are as wide as in the PNG
    figure.set_facecolor(theme.background)
    axes = figure.add_subplot(facecolor=theme.background)
    unit, letters = (1e9, "GB") if max(sizes) >= 1e9 else (1e6, "MB")
    places = [(size / unit, value) for size, value in zip(sizes, values, strict=True)]
    others = places[1:] if first else places
    axes.plot(*zip(*others, strict=True), "o", color=theme.accent, markersize=6.5)
    if first:
        axes.plot(
            *places[0], "D", color=theme.text, markerfacecolor=theme.background, markersize=6.5, markeredgewidth=1.6
        )
    _scale(axes, values)
    _dress(axes, f"Size of the weights, {letters}", theme)
    figure.draw_without_rendering()  # now the axes are where they stay
    figure.set_layout_engine("none")
    _write_names(axes, DPI / 72, [plain(name, LONGEST) for name in short_names(names)], places, theme)
    return figure


def is_wide(values: Sequence[float]) -> bool:
    """True if numbers lie so far apart that a logarithmic axis shows them better."""
    return min(values) > 0 and max(values) / min(values) >= LOG_FROM


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, but whole names where last parts are the same.

    >>> short_names(["org/model", "runs/a/int4", "runs/b/int4"])
    ['model', 'runs/a/int4', 'runs/b/int4']
    """
    lasts = [name.rstrip("/").rpartition("/")[2] or name for name in names]
    return [last if lasts.count(last) == 1 else name for last, name in zip(lasts, names, strict=True)]


def round_numbers(low: float, high: float) -> list[float]:
    """Ticks between two positive numbers on a logarithmic axis: 1, 2, 5, 10 and so on, finer or coarser by the span."""
    tens = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), tuple(range(1, 10))):
        found = [step * 10.0**ten for ten in tens for step in steps if low <= step * 10.0**ten <= high]
        if len(found) >= 4:
            break
    return found[:: math.ceil(len(found) / 9)] if found else []


def _scale(axes: Axes, values: Sequence[float]) -> None:
    wide = is_wide(values)
    axes.margins(x=0.14, y=0.0 if wide else 0.16)
    axes.ticklabel_format(style="plain", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    if wide:
        low, high = math.log10(min(values)), math.log10(max(values))
        pad = 0.16 * (high - low)
        ends = 10.0 ** max(low - pad, -300), 10.0 ** min(high + pad, 307)
        axes.set_yscale("log")
        axes.set_ylim(*ends)
        axes.yaxis.set_major_locator(FixedLocator(round_numbers(*ends)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.15g}" if value < 1e6 else f"{value:.0e}")


def _dress(axes: Axes, below: str, theme: Theme) -> None:
    axes.set_title("Perplexity against size", loc="left", color=theme.text, fontsize=10)
    axes.set_xlabel(below, color=theme.muted, fontsize=9.5)
    axes.set_ylabel("Perplexity", color=theme.muted, fontsize=9.5)
    axes.tick_params(length=0, labelcolor=theme.text, labelsize=9.5)
    axes.grid(color=theme.rule, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.spines[["left", "bottom"]].set(visible=True, color=theme.rule)


def _write_names(
    axes: Axes, dot: float, names: Sequence[str], places: Sequence[tuple[float, float]], theme: Theme
) -> None:
    """Each name as near to its mark as the others leave room for; a line leads to those that stand off.

    `dot` is the pixels of a point.
    """
    marks = [tuple(axes.transData.transform(place)) for place in places]
    taken = [_square(mark, MARK * dot) for mark in marks]
    halo = withStroke(linewidth=2.5, foreground=theme.background)  # keeps the grid out of the letters
    for number, (name, place, mark) in enumerate(zip(names, places, marks, strict=True)):
        text = axes.annotate(name, place, (0, 0), textcoords="offset points", color=theme.text, fontsize=9.5, zorder=5)
        text.set_path_effects([halo])
        crowd = [*taken[:number], *taken[number + 1 :]]
        best = min(_offsets(), key=lambda offset: _clash(_cover(text, mark, offset, dot), axes.bbox, crowd))
        taken += _cover(text, mark, best, dot)
        if math.hypot(*best) > 2 * NEAR:
            line = {"arrowstyle": "-", "color": theme.muted, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3}
            axes.annotate("", place, xytext=best, textcoords="offset points", arrowprops=line)


def _offsets() -> Iterator[tuple[float, float]]:
    """Where a name may stand, in points from the mark to its nearest edge or corner; the nearest first."""
    for ring in range(RINGS):
        far = NEAR + ring * STEP
        yield from ((far * across, far * up) for across, up in SIDES)


def _cover(text: Annotation, mark: tuple[float, float], offset: tuple[float, float], dot: float) -> list[Bbox]:
    """Put a name there; the pixels that it and the way to it then take, as boxes."""
    across, up = offset
    text.xyann = offset
    text.set(ha="left" if across > 0 else "right" if across < 0 else "center")
    text.set(va="bottom" if up > 0 else "top" if up < 0 else "center")
    way = [(mark[0] + across * dot * t / 8, mark[1] + up * dot * t / 8) for t in range(3, 8)]
    return [text.get_window_extent(), *(_square(place, 2 * dot) for place in way)]


def _clash(boxes: Sequence[Bbox], room: BboxBase, crowd: Sequence[Bbox]) -> float:
    """Square pixels outside the room or on top of others."""
    clash = 0.0
    for box in boxes:
        inside = Bbox.intersection(box, room)
        clash += box.width * box.height - (inside.width * inside.height if inside else 0.0)
        shared = (Bbox.intersection(box, other) for other in crowd)
        clash += sum(both.width * both.height for both in shared if both)
    return clash


def _square(centre: tuple[float, float], side: float) -> Bbox:
    return Bbox.from_bounds(centre[0] - side / 2, centre[1] - side / 2, side, side)
