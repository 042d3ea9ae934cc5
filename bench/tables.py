"""Write the tables of README and docs from committed result files; `--check` only compares.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below. One whose result file
is not there stays as it is.
"""

import re
import sys
from typing import Any

from bench.byte_tables import bnb, choices, rounded, then_nf4, tradeoff
from bench.serving_tables import backends, equality, memory, overload, runtime, runtime_bits, soak, speculative, vllm
from bench.sheet import ROOT, calibration, exists, markdown, read, versions

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ALWAYS = ("quality", "comparison")  # their result files are committed
FILES = {"choices": "studies.choices", "rounded": "tradeoff"}  # of tables that are not named after theirs
COMPARED = (
    *("uniform (SVD-LLM)", "SVD-LLM v2", "D-Rank", "ASVD", "Dobi-SVD (ranks)", "ARS", "LLRC, any-k", "STRS, whitened"),
    *("ARA, as published", "ARA, mended", "global", "global, two texts", "rankwise"),
)


def main() -> None:
    """Rewrite every table, or fail if one is out of date."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3] if measured(m[2]) else m[0], old)
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
    texts = f"calibration {calibration(dense)}"
    test = f"test the first {dense['windows']} windows of `{dense['test']}`, {dense['seq_len']} tokens each"
    run = f"Commit {dense['commit']}, {dense['device']}, {versions(dense)}"
    return (
        f"{table}\nPerplexity (lower is better); dense {dense['perplexity']:.2f}. "
        f"`{dense['model']}` in {dense['dtype']}, {texts}, {test}. "
        f"Ratios met within {worst:.3%}. {run}.\n"
    )


def zeroshot() -> str:
    """Accuracy: a row a model, a column a task."""
    rows = read("cpu/zeroshot.jsonl")
    first = rows[0]
    tasks = list(first["scores"])
    body = [
        [row["name"], f"{row['ratio']:.0%}"]
        + [f"{row['scores'][task]['acc']:.1%}" for task in tasks]
        + [f"{row['mean'][key]:.1%}" for key in ("acc", "acc_norm")]
        for row in rows
    ]
    table = markdown(["model", "kept", *(f"`{task}`" for task in tasks), "mean", "mean, normalised"], body)
    asked = "all" if first["limit"] is None else f"the first {first['limit']}"
    errors = [score["acc_stderr"] or 0 for row in rows for score in row["scores"].values()]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"{table}\nZero-shot accuracy by lm-eval: `acc`; normalised: `acc_norm` where there is one. On {asked} "
        f"questions of each task, standard error up to {max(errors):.1%} a task. In {first['stored']}. "
        f"Commit {commits}, {first['device']}, {versions(first)}.\n"
    )


def comparison() -> str:
    """The methods of the papers and the default, as published or as their paper would have them."""
    rows = read("cpu/methods.jsonl")
    if missing := set(COMPARED) - {row["name"] for row in rows}:
        sys.exit(f"no rows of {', '.join(sorted(missing))} to compare")
    columns, body = perplexities([row for row in rows if row["name"] in COMPARED])
    table = markdown(["method", *columns], [line for line, _ in body])
    return f"{table}\nPerplexity (lower is better), {setting(rows)}\n"


def methods() -> str:
    """Perplexity of every method: a row a method, a column a ratio and test text."""
    rows = read("cpu/methods.jsonl")
    columns, body = perplexities([row for row in rows if row["name"] != "dense"])
    lines = []
    for line, found in body:
        spent = ", ".join(f"{row['seconds']:.0f}" for row in found)
        lines.append([*line, spent, f"{max(row['peak_bytes'] for row in found) / 1e9:.1f}"])
    heads = ["method", *columns, "seconds", "peak GB"]
    cost = "Seconds without curvature and factors, which all share."
    return f"{markdown(heads, lines)}\nPerplexity (lower is better), {setting(rows)} {cost}\n"


def perplexities(rows: list[dict[str, Any]]) -> tuple[list[str], list[tuple[list[str], list[dict[str, Any]]]]]:
    """Heads of the columns, a ratio and test text each; a line a method, the worst first, and its rows."""
    columns = sorted(
        {(row["ratio"], test) for row in rows for test in row["tests"]}, key=lambda c: (-c[0], c[1] == "c4")
    )
    body = []
    rows = sorted(rows, key=lambda row: -row["ratio"])
    for name in dict.fromkeys(row["name"] for row in rows):
        found = {row["ratio"]: row for row in rows if row["name"] == name}
        figures = [f"{found[r]['perplexity'][t]:.2f}" if r in found else "–" for r, t in columns]
        body.append(([name, *figures], list(found.values())))
    body.sort(key=lambda entry: [-row["perplexity"]["wikitext2"] for row in entry[1] if row["ratio"] == 0.8] or [0.0])
    return [f"{ratio:.0%}, {test}" for ratio, test in columns], body


def setting(rows: list[dict[str, Any]]) -> str:
    """What the methods were measured on."""
    dense = next(row for row in rows if row["name"] == "dense")
    others = [row for row in rows if row is not dense]
    before = ", ".join(f"{test} {value:.2f}" for test, value in dense["perplexity"].items())
    two = next((row for row in others if "+" in row["calibration"]), None)
    of_two = two and (
        f" (of two texts, and in `rankwise`: from {two['samples']} windows, one of C4 after each of WikiText-2, "
        f"gradients on the first {two['gradient_samples']})"
    )
    missed, worst = max((abs(row["measured_ratio"] / row["ratio"] - 1), row["name"]) for row in others)
    return (
        f"dense: {before}. `{dense['model']}` in {dense['dtype']}, curvature from {calibration(dense)}{of_two or ''}, "
        f"tests on {dense['windows']} windows, {dense['seq_len']} tokens each; masks trained {dense['steps']} steps of "
        f"{dense['train_len']} tokens, WikiText-2 and C4 in turn. Ratios met within {missed:.2%} "
        f"({worst}). {dense['device']}, {versions(dense)}."
    )


def estimate() -> str:
    """Minutes that a 7B would take by counted operations: a row a method, a column a stage."""
    rows = read("cpu/estimate.jsonl")
    stages = list(dict.fromkeys(stage for row in rows for stage in row["seconds"]))
    body = []
    for row in rows:
        minutes = [f"{row['seconds'][s] / 60:.1f}" if s in row["seconds"] else "–" for s in stages]
        total = sum(row["seconds"].values()) / 60
        body.append([f"`{row['method']}`", *minutes, f"{total:.0f}", f"{abs(row['apart']):.1%}"])
    table = markdown(["method", *stages, "minutes", "the two sizes differ by"], body)
    return f"{table}\nEstimated minutes, not measured, at {rows[0]['ratio']:.0%} kept. {versions(rows[0])}.\n"


def measured(name: str) -> bool:
    """Whether a table's result file is there; those of `quality` and `methods` are committed and have to be."""
    return name in ALWAYS or exists(f"cpu/{FILES.get(name, name)}.jsonl")


TABLES = {
    "backends": backends,
    "bnb": bnb,
    "choices": choices,
    "comparison": comparison,
    "equality": equality,
    "estimate": estimate,
    "memory": memory,
    "methods": methods,
    "overload": overload,
    "quality": quality,
    "rounded": rounded,
    "runtime": runtime,
    "runtime_bits": runtime_bits,
    "soak": soak,
    "speculative": speculative,
    "then_nf4": then_nf4,
    "tradeoff": tradeoff,
    "vllm": vllm,
    "zeroshot": zeroshot,
}

if __name__ == "__main__":
    main()
