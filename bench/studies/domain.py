"""Does the calibration's domain matter? WikiText-2, C4 and code, crossed with tests on each, `global` at 80 %."""

import math

from bench.harness import Case, run
from bench.studies.plots import figure, grid
from bench.texts import DOMAINS


def cases() -> list[Case]:
    """The dense model, and one row a calibration."""
    rows = [Case("dense", "", 1.0, tests=DOMAINS)]
    return rows + [
        Case(d, "global", 0.8, calibration=d, samples=48, gradient_samples=16, tests=DOMAINS) for d in DOMAINS
    ]


if __name__ == "__main__":
    rows = run("studies.domain", cases(), str(__doc__))
    if rows:
        dense, *found = rows
        above = [[math.log(row["perplexity"][test] / dense["perplexity"][test]) for test in DOMAINS] for row in found]
        heading = "nats above the dense model: calibrated on (down), tested on (across)"
        figure("calibration-domain", grid(above, DOMAINS, [row["name"] for row in found], heading))
