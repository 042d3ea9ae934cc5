"""How many calibration windows are enough? 8 to 64 of WikiText-2, which `rankwise` is refit to, too, at 80 %."""

from bench.harness import Case, run
from bench.studies.plots import figure, lines

SIZES = (8, 16, 64)


def cases() -> list[Case]:
    """Two methods at every size; three eighths of the windows for output gradients, as in `bench.methods`."""
    return [
        Case(name, name, 0.8, refit=name == "rankwise", samples=size, gradient_samples=size * 3 // 8, learn=())
        for size in SIZES
        for name in ("global", "rankwise")
    ]


if __name__ == "__main__":
    rows = run("studies.size", cases(), str(__doc__))
    if rows:
        figure(
            "calibration-size", lines(rows, lambda row: row["samples"], "wikitext2", "calibration windows", log=True)
        )
