"""One figure a study, from its rows, beside the result file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
Row = dict[str, Any]


def figure(name: str, draw: Callable[[Axes], None], *, width: float = 6.0, height: float = 4.0) -> Path:
    """Draw on one pair of axes and save `docs/figures/NAME.svg`."""
    made = Figure(figsize=(width, height), layout="constrained")
    draw(made.add_subplot())
    FIGURES.mkdir(parents=True, exist_ok=True)
    path = FIGURES / f"{name}.svg"
    save(made, path)
    return path


def save(figure: Figure, path: Path) -> None:
    """As an SVG that is the same each time."""
    with rc_context({"svg.hashsalt": "rankwise"}):
        figure.savefig(path, metadata={"Date": None})


def lines(rows: Sequence[Row], x: Callable[[Row], float], test: str, heading: str, log: bool) -> Callable[[Axes], None]:
    """Perplexity on one test text against `x`, a line a name."""

    def draw(axes: Axes) -> None:
        for name in dict.fromkeys(row["name"] for row in rows):
            points = sorted((x(row), row["perplexity"][test]) for row in rows if row["name"] == name)
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=heading, ylabel=f"perplexity, {test}", xscale="log" if log else "linear")
        axes.legend()

    return draw


def grid(
    values: Sequence[Sequence[float]], across: Sequence[str], down: Sequence[str], heading: str
) -> Callable[[Axes], None]:
    """Numbers in a coloured grid."""

    def draw(axes: Axes) -> None:
        image = axes.imshow(values, cmap="viridis_r")
        axes.set(
            xticks=range(len(across)), yticks=range(len(down)), xticklabels=across, yticklabels=down, title=heading
        )
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "white" if image.norm(value) > 0.5 else "black"
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=colour)

    return draw
