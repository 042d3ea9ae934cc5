"""Every allocation method on one table: method × ratio × test text, on one model, from one run.

    python -m bench.methods --train wikitext-2-raw/train_1MB.txt --test wikitext-2-raw/test.txt --c4 c4.jsonl

Curvature comes from the first windows of the train text; for `rankwise` and what it is made of, from the train text and
C4 in turn. Methods that learn see the train text's next windows and C4 documents, in turn; C4 is tested on documents
that nothing else saw. What takes a method apart is measured at some of the ratios alone. Interrupted, the same command
goes on with the first row that is missing; `--only NAME` measures some rows.
Rows go to bench/results/cpu/methods.jsonl.
"""

from typing import Any

from bench.harness import Case, run

RATIOS = (0.8, 0.6, 0.9)
HEAL = 160  # steps
LONGER = "ARA, mended, 512 steps"
MORE_TEXT, HEALED = "rankwise, refit to more text", f"rankwise, healed {HEAL} steps"
PLAIN, PIVOT = ["dense", "lowrank"], ["dense", "lowrank", "pivot"]

BOTH: dict[str, Any] = {"calibration": "wikitext2+c4", "samples": 128, "gradient_samples": 48, "learn": ()}

ENTRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform (SVD-LLM)": ("svd-llm", {}),
    "global": ("global", {}),
    "global, no pivot": ("global", {"kinds": PLAIN}),
    "rankwise, one text, all channels": ("rankwise", {"channel_multiple": 0}),
    "global, two texts": ("global", {}),
    "global, two texts, channels": ("global", {"channel_multiple": 64}),
    "global, two texts, channels, no pivot": ("global", {"channel_multiple": 64, "kinds": PLAIN}),
    "rankwise": ("rankwise", {}),
    "rankwise, no pivot": ("rankwise", {"kinds": PLAIN}),
    "SVD-LLM v2": ("svd-llm-v2", {}),
    "D-Rank": ("d-rank", {}),
    "ARA, as published": ("ara", {"faithful": True}),
    "LLRC, any-k": ("llrc", {"selection": "any-k", "kinds": PLAIN}),
    "LLRC, top-k": ("llrc", {"selection": "top-k", "kinds": PLAIN}),
    "LLRC, any-k, whitened": ("llrc", {"selection": "any-k", "kinds": PLAIN, "sides": "one"}),
    "ARA, mended": ("ara", {"kinds": PLAIN, "sides": "one"}),
    LONGER: ("ara", {"kinds": PLAIN, "sides": "one", "steps": 512}),
    "ARA, mended, pivot, from global": ("ara", {"kinds": PIVOT, "sides": "two", "start": "global"}),
    "STRS, whitened": ("strs", {"samples": 1}),
    "ASVD": ("asvd", {"samples": 1}),
    "Dobi-SVD (ranks)": ("dobi-svd", {"kinds": PLAIN, "sides": "one"}),
    "ARS": ("ars", {"kinds": PLAIN, "sides": "one"}),
}


SOME: dict[str, tuple[float, ...]] = {  # rows that take a method apart, and where
    "rankwise, one text, all channels": (0.8,),
    "rankwise, no pivot": (0.8,),
    "ARA, mended, pivot, from global": (0.8,),
    "LLRC, any-k, whitened": (0.8,),
    LONGER: (0.8,),
    MORE_TEXT: (0.6,),
    HEALED: (0.6,),
}


def cases() -> list[Case]:
    """Dense once, then every method at every ratio at which it is measured."""
    rows = [Case("dense", "", 1.0)]
    for ratio in RATIOS:
        for name, (method, settings) in ENTRIES.items():
            more = BOTH if "two texts" in name or name in ("rankwise", "rankwise, no pivot") else {}
            rows.append(Case(name, method, ratio, settings, refit=method == "rankwise", **more))
        rest = BOTH | {"refit": True, "learn": ("wikitext2+c4",)}
        rows.append(Case(MORE_TEXT, "rankwise", ratio, **rest))
        rows.append(Case(HEALED, "rankwise", ratio, heal=HEAL, **rest))
    return [row for row in rows if row.ratio in SOME.get(row.name, (row.ratio,))]


if __name__ == "__main__":
    run("methods", cases(), str(__doc__))
