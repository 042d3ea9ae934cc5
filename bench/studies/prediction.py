"""Does predicted truncation loss tell perplexity? Two-sided plans of two allocations at many ratios."""

import math

from matplotlib.axes import Axes
from scipy.stats import spearmanr

from bench.harness import Case, run
from bench.studies.plots import figure

RATIOS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)


def cases() -> list[Case]:
    """The dense model, `global` and `uniform` at every ratio, on the same factors."""
    rows = [Case("dense", "", 1.0)]
    for ratio in RATIOS:
        rows += [Case("global", "global", ratio), Case("uniform", "uniform", ratio, {"sides": "two"})]
    return rows


if __name__ == "__main__":
    found = run("studies.prediction", cases(), str(__doc__))
    dense = next((row["perplexity"]["wikitext2"] for row in found if row["name"] == "dense"), math.nan)
    rows = [row for row in found if row["name"] != "dense"]

    def draw(axes: Axes) -> None:
        """Measured against predicted nats a token."""
        for name in ("global", "uniform"):
            here = [row for row in rows if row["name"] == name]
            measured = [math.log(row["perplexity"]["wikitext2"] / dense) for row in here]
            axes.loglog([row["predicted_loss"] for row in here], measured, marker="o", label=name)
        axes.axline((0.1, 0.1), (1, 1), color="grey", linewidth=0.8)
        both = [(row["predicted_loss"], row["perplexity"]["wikitext2"]) for row in rows]
        rank = spearmanr(*zip(*both, strict=True)).statistic
        axes.set(xlabel="predicted loss, nats a token", ylabel="measured", title=f"rank correlation {rank:.3f}")
        axes.legend()

    if rows:
        figure("predicted-loss", draw)
