"""Write the tables of README and docs from committed result files; `--check` only compares.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite every table, or fail if one is out of date."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], old)
        if new != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"tables out of date in {', '.join(stale)}: run `make tables`")


def quality() -> str:
    """Perplexity: a row a method, a column a ratio."""
    rows = read("cpu/quality.jsonl")
    dense = next(row for row in rows if row["name"] == "dense")
    ratios = sorted({row["ratio"] for row in rows if row is not dense}, reverse=True)
    names = list(dict.fromkeys(row["name"] for row in rows if row is not dense))
    found = {(row["name"], row["ratio"]): f"{row['perplexity']:.2f}" for row in rows}
    body = [[name, *(found.get((name, ratio), "–") for ratio in ratios)] for name in names]
    table = markdown(["factors and allocation", *(f"{ratio:.0%} kept" for ratio in ratios)], body)
    worst = max(abs(row["measured_ratio"] / row["ratio"] - 1) for row in rows if row is not dense)
    texts = f"calibration {dense['samples']} + {dense['gradient_samples']} windows of `{dense['train']}`"
    test = f"test the first {dense['windows']} windows of `{dense['test']}`, {dense['seq_len']} tokens each"
    versions = ", ".join(f"{name} {version}" for name, version in dense["versions"].items() if name != "rankwise")
    run = f"Commit {dense['commit']}, {dense['device']}, {versions}"
    return (
        f"{table}\nPerplexity (lower is better); dense {dense['perplexity']:.2f}. "
        f"`{dense['model']}` in {dense['dtype']}, {texts}, {test}. "
        f"Ratios met within {worst:.3%}. {run}.\n"
    )


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a result file."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def markdown(heads: list[str], body: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [heads, ["---", *(["---:"] * (len(heads) - 1))], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES = {"quality": quality}

if __name__ == "__main__":
    main()
