"""Maps of a plan: one value a module, laid out by module type and block."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection, QuadMesh
from matplotlib.colors import Colormap, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from rankwise.figures import Theme, plain
from rankwise.plan import LayerSpec

WIDTH = 9.4  # inches
ROW, MOST_ROWS = 0.3, 60  # inches a map row; beyond that many rows they get lower
TICKS = 20  # most labels along a map's blocks
NAME = re.compile(r"(?P<prefix>(?:[^.]+\.)*?)(?P<block>[0-9]{1,9})\.(?P<kind>.+)")


@dataclass(frozen=True)
class Grid:
    """One value per module, laid out by module type and block.

    Args:
        rows: module types, in model order.
        columns: block indices, ascending.
        values: `[rows, columns]`, NaN where unknown or absent.
        kinds: `[rows, columns]` of LayerSpec kinds, "" where the plan has no such module.
    """

    rows: list[str]
    columns: list[int]
    values: np.ndarray
    kinds: np.ndarray

    @property
    def shown(self) -> np.ndarray:
        """The values that get a colour: those of compressed modules, NaN elsewhere."""
        return np.where(self.kinds == "dense", np.nan, self.values)


def parse_name(name: str) -> tuple[str, int, str] | None:
    """Prefix, block index and module type of a module's name, or None if there is no block in it.

    >>> parse_name("model.layers.7.self_attn.q_proj")
    ('model.layers', 7, 'self_attn.q_proj')
    """
    match = NAME.fullmatch(name)
    return (match["prefix"].rstrip("."), int(match["block"]), match["kind"]) if match else None


def make_grid(layers: Mapping[str, LayerSpec], value: Callable[[LayerSpec], float | None]) -> Grid:
    """Lay `value` of every layer out by module type and block. Layers outside the blocks are left out."""
    parsed = {name: place for name in layers if (place := parse_name(name))}
    several = len({prefix for prefix, _, _ in parsed.values()}) > 1
    cells = {name: (f"{p}.*.{kind}" if several else kind, block) for name, (p, block, kind) in parsed.items()}
    rows = list(dict.fromkeys(kind for kind, _ in cells.values()))
    columns = sorted({block for _, block in cells.values()})
    values = np.full((len(rows), len(columns)), np.nan)
    kinds = np.full(values.shape, "", dtype=object)
    row_of, column_of = ({key: i for i, key in enumerate(keys)} for keys in (rows, columns))
    for name, (kind, block) in cells.items():
        y, x, found = row_of[kind], column_of[block], value(layers[name])
        values[y, x] = np.nan if found is None else found
        kinds[y, x] = layers[name].kind
    return Grid(rows, columns, values, kinds)


def limits(values: np.ndarray) -> tuple[float, float]:
    """Colour range of the known values: all of them, unless a few low ones would flatten the rest.

    Then it starts at the 5th percentile, and the colour bar gets an arrow.
    """
    known = values[np.isfinite(values)]
    low, fifth, high = (float(q) for q in np.quantile(known, [0.0, 0.05, 1.0]))
    start = fifth if fifth - low > high - fifth else low
    return (start, high) if high - start > 1e-6 else (start - 0.005, start + 0.005)


def rank_map(grid: Grid, theme: Theme) -> Figure:
    """Kept share of parameters by module type (rows) and block (columns); dense modules are crossed out."""
    return _map(grid, theme, "Kept share of parameters")


def energy_map(grid: Grid, theme: Theme) -> Figure:
    """Kept share of the metric's energy, laid out as `rank_map`."""
    return _map(grid, theme, "Kept share of energy")


def mixed(grid: Grid) -> bool:
    """True if lowrank cells need a mark that tells them from pivot ones."""
    return bool((grid.kinds == "lowrank").any() and (grid.kinds == "pivot").any())


def _map(grid: Grid, theme: Theme, title: str) -> Figure:
    height = 1.15 + ROW * min(len(grid.rows), MOST_ROWS)
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=theme.background)
    axes = figure.add_subplot(facecolor=theme.background)
    axes.set_xlim(0, len(grid.columns))
    axes.set_ylim(len(grid.rows), 0)
    _label_axes(axes, grid, theme)
    if np.isfinite(grid.shown).any():
        mesh = _draw_cells(axes, grid, theme)
        bar = figure.colorbar(mesh, ax=axes, pad=0.015, fraction=0.03, aspect=14, extend=_extend(grid))
        low, high = mesh.get_clim()
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.05 else 2))
        bar.ax.tick_params(colors=theme.muted, labelcolor=theme.text, labelsize=9.5)
        bar.outline.set_edgecolor(theme.rule)
    _draw_dense(axes, grid, theme)
    axes.set_title(title, loc="left", color=theme.text, fontsize=10)
    _legend(axes, grid, theme)
    return figure


def _label_axes(axes: Axes, grid: Grid, theme: Theme) -> None:
    step_x, step_y = _step(len(grid.columns), TICKS), _step(len(grid.rows), MOST_ROWS)
    places = [i for i, block in enumerate(grid.columns) if block % step_x == 0] or [0]
    axes.set_xticks([i + 0.5 for i in places], [str(grid.columns[i]) for i in places])
    rows = range(0, len(grid.rows), step_y)
    axes.set_yticks([i + 0.5 for i in rows], [plain(grid.rows[i], 34) for i in rows])
    axes.set_xlabel("block", color=theme.muted, fontsize=9.5)
    axes.tick_params(length=0, labelcolor=theme.text, labelsize=9.5)
    axes.spines[:].set_visible(False)


def _draw_cells(axes: Axes, grid: Grid, theme: Theme) -> QuadMesh:
    low, high = limits(grid.shown)
    shown = np.ma.masked_invalid(grid.shown)
    mesh = axes.pcolormesh(shown, cmap=_colormap(), vmin=low, vmax=high, edgecolors=theme.background, linewidth=0.7)
    if mixed(grid):
        y, x = np.nonzero((grid.kinds == "lowrank") & ~shown.mask)
        bright = mesh.to_rgba(shown[y, x])[:, :3] @ [0.299, 0.587, 0.114] > 0.5
        colours = np.where(bright, "#101418", "#ffffff")
        axes.scatter(x + 0.5, y + 0.5, s=5, c=colours, linewidths=0)
    return mesh


def _draw_dense(axes: Axes, grid: Grid, theme: Theme) -> None:
    """Every dense cell gets a plain face and a stroke across, which stays visible at any cell size."""
    y, x = np.nonzero(grid.kinds == "dense")
    cells = [Rectangle((float(i), float(j)), 1, 1) for j, i in zip(y, x, strict=True)]
    axes.add_collection(
        PatchCollection(cells, facecolor=theme.surface, edgecolor=theme.background, linewidth=0.7), autolim=False
    )
    strokes = [[(i + 0.2, j + 0.8), (i + 0.8, j + 0.2)] for j, i in zip(y, x, strict=True)]
    axes.add_collection(LineCollection(strokes, colors=theme.muted, linewidths=1.0), autolim=False)


def _legend(axes: Axes, grid: Grid, theme: Theme) -> None:
    face = to_hex(_colormap()(0.6))
    colours = {"pivot": face, "lowrank": face, "dense": theme.surface}
    marks: dict[str, dict[str, Any]] = {"dense": {"marker": (2, 2, -45), "markersize": 7, "color": theme.muted}}
    if mixed(grid):
        marks["lowrank"] = {"marker": "o", "markersize": 2.5, "color": "#101418"}
    handles, labels = [], []
    for kind, colour in colours.items():
        if count := int((grid.kinds == kind).sum()):
            square = Line2D([], [], linestyle="", marker="s", markersize=10, color=colour)
            handles.append((square, Line2D([], [], linestyle="", **marks.get(kind, {}))))
            labels.append(f"{kind} ({count})")
    options: dict[str, Any] = {"frameon": False, "fontsize": 9.5, "labelcolor": theme.text, "handlelength": 1}
    together = {tuple: HandlerTuple(ndivide=1)}
    axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, handler_map=together, **options)


def _extend(grid: Grid) -> str:
    return "min" if np.nanmin(grid.shown) < limits(grid.shown)[0] else "neither"


def _colormap() -> Colormap:
    """viridis without its ends, which vanish on a dark or a white page."""
    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.1, 0.95, 256)))


def _step(count: int, most: int) -> int:
    return next((step for step in (1, 2, 5, 10, 20, 50) if count <= most * step), 100)
