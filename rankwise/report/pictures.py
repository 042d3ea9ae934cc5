"""The pictures of a page: what they show, their captions, and the same in words."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from rankwise.figures import Theme
from rankwise.plan import RankPlan
from rankwise.report.bars import bars
from rankwise.report.formats import Row, name_of, setting, share, show
from rankwise.report.maps import Grid, energy_map, limits, make_grid, mixed, rank_map
from rankwise.report.points import is_wide, points

BARS = (  # file, key of a row, what is seen
    ("perplexity", "perplexity", "Perplexity; lower is better"),
    ("size", "weight_bytes", "Size of the weights; smaller is better"),
    ("decode", "tokens_per_s", "Decode, tokens per second; higher is better"),
    ("prefill", "prefill_ms_p50", "Prefill latency, median; lower is better"),
)
LEAST_POINTS = 3  # fewer models say nothing about a trade-off


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Args:
        name: of its files, without theme and suffix.
        caption: one line: what is seen, and the settings.
        alt: the same, with the numbers, for those who cannot see it.
        draw: makes the figure for a theme.
        wide: takes the page's whole width.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[Theme], Figure]
    wide: bool = False


def map_pictures(plan: RankPlan) -> list[Picture]:
    """The rank map, and the energy map if energies are known; none if no module lies in a block."""
    pictures = []
    ranks = make_grid(plan.layers, lambda spec: spec.ratio)
    energies = make_grid(plan.layers, lambda spec: spec.energy)
    if ranks.rows:
        what = f"Kept share of parameters by module type and block; {share(plan.ratio)} over all modules"
        pictures.append(_map_picture("rank_map", what, ranks, rank_map))
    if np.isfinite(energies.shown).any():
        what = "Kept share of the energy, in the metric of the calibration text, by module type and block"
        pictures.append(_map_picture("energy_map", what, energies, energy_map))
    return pictures


def bar_pictures(rows: Sequence[Row]) -> list[Picture]:
    """A bar figure for every quantity that was measured for at least two models."""
    pictures = []
    names = [name_of(row) for row in rows]
    for name, key, what in BARS:
        values = [row.get(key) for row in rows]
        if sum(map(_is_finite, values)) < 2:
            continue
        labels = [show(key, row, rows) for row in rows]
        alt = f"{what}. " + ", ".join(f"{n}: {label}" for n, label in zip(names, labels, strict=True)) + "."
        measured = setting(rows, key)
        caption = f"{what}; {measured}." if measured else f"{what}."
        pictures.append(Picture(name, caption, alt, partial(bars, what, names, values, labels)))
    return pictures


def tradeoff_pictures(rows: Sequence[Row]) -> list[Picture]:
    """Perplexity against size, if at least three models have both."""
    shown = [row for row in rows if _has_both(row)]
    if len(shown) < LEAST_POINTS:
        return []
    names, first = [name_of(row) for row in shown], shown[0] is rows[0]
    sizes, values = ([float(row[key]) for row in shown] for key in ("weight_bytes", "perplexity"))
    what = "Perplexity against size of the weights; lower left is better"
    told = [
        f"{n}: {show('weight_bytes', row, shown)}, {show('perplexity', row, shown)}"
        for n, row in zip(names, shown, strict=True)
    ]
    remarks = [f"{what}; {setting(shown, 'perplexity')}."]
    if first:
        remarks.append(f"Diamond: {names[0]}, with which the others are compared.")
    if is_wide(values):
        remarks.append("The scale of the perplexity is logarithmic.")
    if missing := [name_of(row) for row in rows if not _has_both(row)]:
        remarks.append(f"Not shown, for want of a number: {', '.join(missing)}.")
    draw = partial(points, names, sizes, values, first)
    return [Picture("tradeoff", " ".join(remarks), f"{what}. {'; '.join(told)}.", draw)]


def _has_both(row: Row) -> bool:
    return _is_finite(row.get("perplexity")) and _is_finite(row.get("weight_bytes"))


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _map_picture(name: str, what: str, grid: Grid, draw: Callable[[Grid, Theme], Figure]) -> Picture:
    shown, dense = grid.shown, grid.kinds == "dense"
    caption = f"{what}."
    alt = f"{what}. {len(grid.rows)} module types in {len(grid.columns)} blocks; modules left dense: {dense.sum()}."
    if np.isfinite(shown).any():
        ends = [np.unravel_index(find(shown), shown.shape) for find in (np.nanargmin, np.nanargmax)]
        low, high = (f"{share(shown[y, x])} ({grid.rows[y]} of block {grid.columns[x]})" for y, x in ends)
        alt += f" Compressed modules keep from {low} to {high}."
        if limits(shown)[0] > shown[ends[0]]:
            caption += " Colours start at the 5th percentile."
    if dense.any():
        caption += " Crossed out: left dense."
    if mixed(grid):
        caption += " Dots: lowrank; other colours: pivot."
    if (np.isnan(shown) & ~dense).any():
        caption += " Blank: no value."
    return Picture(name, caption, alt, partial(draw, grid), wide=True)
