"""Do masks settle? Three seeds of ARA and LLRC at 80 %: perplexities, and how alike the learnt maps of ranks are."""

from itertools import combinations
from typing import Any

import numpy as np

from bench.harness import Case, run
from bench.studies.plots import figure, grid

SEEDS = (0, 1, 2)
PLAIN = ["dense", "lowrank"]


def cases() -> list[Case]:
    """Three seeds of two methods, and the closed-form plan to compare with."""
    ara: dict[str, Any] = {"kinds": PLAIN, "sides": "one"}
    rows = [Case("ARA", "ara", 0.8, ara, seed=seed) for seed in SEEDS]
    rows += [Case("LLRC", "llrc", 0.8, {"kinds": PLAIN}, seed=seed) for seed in SEEDS]
    return [*rows, Case("global", "global", 0.8, {"kinds": PLAIN})]


def overlap(a: list[float], b: list[float]) -> float:
    """Common share of two rank maps: Σ min over Σ max of the layers' kept shares."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


if __name__ == "__main__":
    rows = run("studies.stability", cases(), str(__doc__))
    if rows:
        names = [f"{row['name']} {row['seed']}" for row in rows]
        table = np.eye(len(rows))
        for i, j in combinations(range(len(rows)), 2):
            table[i, j] = table[j, i] = overlap(rows[i]["shares"], rows[j]["shares"])
        figure("mask-stability", grid(table.tolist(), names, names, "overlap of rank maps"), width=8, height=6)
