"""What in mask training matters? λ of the guidance loss, staircase or Gumbel, total variation, the last rescaling.

One case changes one thing of ARA (lowrank or dense, one-sided factors) or of LLRC at 80 %.
"""

from matplotlib.axes import Axes

from bench.harness import Case, run
from bench.studies.plots import figure

ARA = {"kinds": ["dense", "lowrank"], "sides": "one"}
LLRC = {"kinds": ["dense", "lowrank"]}


def cases() -> list[Case]:
    """One thing changed in each."""
    rows = [
        Case(f"ARA, guidance {weight}", "ara", 0.8, ARA | {"lambda2": weight}) for weight in (0.0, 5.0, 50.0, 500.0)
    ]
    rows += [Case("ARA, Gumbel-sigmoid", "ara", 0.8, ARA | {"parametrisation": "gumbel"})]
    rows += [Case("ARA, weighted rescale", "ara", 0.8, ARA | {"rescale": "weighted"})]
    rows += [Case(f"LLRC, variation {weight}", "llrc", 0.8, LLRC | {"variation": weight}) for weight in (0.0, 0.1)]
    return rows


if __name__ == "__main__":
    rows = run("studies.masks", cases(), str(__doc__))

    def draw(axes: Axes) -> None:
        """A point a case and a text."""
        for test, marker in (("wikitext2", "o"), ("c4", "s")):
            axes.plot([row["perplexity"][test] for row in rows], [row["name"] for row in rows], marker, label=test)
        axes.set(xlabel="perplexity", xscale="log")
        axes.grid(axis="x", which="both", alpha=0.3)
        axes.invert_yaxis()
        axes.legend()

    if rows:
        figure("mask-training", draw, width=7)
