"""Tables of bytes: precisions, ranks, and both under one budget. `bench.tables` writes them."""

from statistics import median
from typing import Any

from scipy.stats import spearmanr

from bench.sheet import calibration, markdown, read, versions

TEXTS = ("wikitext2", "c4")
MODELS = ((False, "rotated"), (True, "as it comes"))
TOGETHER = ("chosen together, channels too", "chosen together")
CAUSES = ("ranks", "rounding", "ranks and rounding")
BESIDE = ("lowrank and dense, bf16", "pivot and dense, bf16")

Row = dict[str, Any]


def rounded() -> str:
    """Perplexity of whole models in one precision: a row a precision, to the nearest and fed back on each model."""
    rows = [row for row in read("cpu/tradeoff.jsonl") if row["asked"] is None]
    found = {(row["name"].removesuffix(", nearest"), row["plain"], row["rounding"]): row for row in rows}
    dense = [cell for plain, _ in MODELS for cell in ("–", figures(found.get(("dense", plain, ""))))]
    body = [["bf16", "100%", "16", *dense]]
    whole = {name: row for (name, *_), row in found.items() if "share" in row}
    for name, any_row in sorted(whole.items(), key=lambda entry: -entry[1]["share"]):
        cells = [figures(found.get((name, plain, way))) for plain, _ in MODELS for way in ("nearest", "feedback")]
        body.append([name, f"{any_row['share']:.1%}", f"{any_row['bits']:.3g}", *cells])
    heads = [f"{title}, {way}" for _, title in MODELS for way in ("nearest", "fed back")]
    return f"{markdown(['layers', 'bytes of bf16', 'bits a weight', *heads], body)}\n{tested(rows[0])}\n"


def tradeoff() -> str:
    """Perplexity against bytes: a row a size, a column a way to spend it, a part for each model."""
    every = read("cpu/tradeoff.jsonl")
    sizes = sorted({row["asked"] for row in every if row["asked"]}, reverse=True)
    body = []
    for plain, title in MODELS:
        rows = [row for row in every if row["plain"] == plain and "share" in row]
        for size in sizes:
            own = {row["name"]: row for row in rows if row["asked"] == size}
            one = best([row for row in rows if row["asked"] is None and row["share"] <= size])
            ranks = best([row for name, row in own.items() if name.startswith("ranks, then")])
            cells = [figures(own.get(name)) for name in TOGETHER]
            cells += [f"{figures(row)} {said(row)}".strip() for row in (one, ranks)]
            body.append([title, f"{size:.0%}", *cells, *(figures(own.get(name)) for name in BESIDE)])
    heads = ["model", "bytes of bf16", *TOGETHER, "one precision", "ranks, then one precision", *BESIDE]
    over = max(row["share"] / row["asked"] for row in every if row["asked"])
    under = min((row["share"] / row["asked"], row["name"]) for row in every if row["name"] in TOGETHER)
    met = f"Of its bytes a row of those chosen together takes {under[0]:.3%} or more, and no row more than {over:.3%}."
    return f"{markdown(heads, body)}\n{tested(every[0])} {met}\n"


def best(rows: list[Row]) -> Row | None:
    """The one with the least perplexity on WikiText-2."""
    return min(rows, key=lambda row: row["perplexity"]["wikitext2"], default=None)


def said(row: Row | None) -> str:
    """The precision of a row, in brackets."""
    return f"({row['name'].removeprefix('ranks, then ')})" if row else ""


def figures(row: Row | None) -> str:
    """Perplexity on both texts; a dash where nothing was measured."""
    return " / ".join(f"{row['perplexity'][text]:,.2f}" for text in TEXTS) if row else "–"


def tested(row: Row) -> str:
    """What the rows were measured on."""
    return (
        f"Perplexity (lower is better) on WikiText-2 / C4, {row['windows']} windows of {row['seq_len']} tokens; bytes "
        f"of the linear layers. `{row['model']}`, curvature from {calibration(row)}. {row['device']}, {versions(row)}."
    )


def then_nf4() -> str:
    """Perplexity before and after nf4: a row a method."""
    rows = sorted(read("cpu/then_nf4.jsonl"), key=lambda row: row["perplexity"]["bf16"]["wikitext2"])
    body = []
    for row in rows:
        cells = [f"{row['perplexity'][stored][text]:,.2f}" for text in TEXTS for stored in ("bf16", "nf4")]
        body.append([row["name"], f"{row['ratio']:.0%}", *cells])
    first = rows[0]
    table = markdown(["method", "kept", "wikitext2, bf16", "wikitext2, nf4", "c4, bf16", "c4, nf4"], body)
    return f"{table}\nPerplexity (lower is better) of `{first['model']}`. {versions(first)}.\n"


def bnb() -> str:
    """nf4 here and in bitsandbytes: a row a model and dtype."""
    rows, body = read("cpu/bnb.jsonl"), []
    for row in rows:
        codes, title = row["codes"], "rotated" if row["rotate"] else "as it comes"
        values = [f"{row[way]['perplexity']:.3f}" for way in ("dense", "rankwise", "bitsandbytes")]
        counts = [f"{codes[key]:,}" for key in ("all", "differing", "absmax_differing")]
        body.append([title, row["dtype"], *values, f"{row['apart']:.3%}", *counts])
    heads = ["model", "dtype", "dense", "nf4, rankwise", "nf4, bitsandbytes", "apart"]
    table, first = markdown([*heads, "codes", "that differ", "absmax that differ"], body), rows[0]
    return (
        f"{table}\nPerplexity on {first['windows']} windows of WikiText-2, {first['seq_len']} tokens each. "
        f"`{first['model']}`, {first['device']}, {versions(first)}.\n"
    )


def choices() -> str:
    """Single choices, predicted and measured: a row a cause of loss."""
    rows, body = read("cpu/studies.choices.jsonl"), []
    for name in (*CAUSES, None):
        some = [row for row in rows if name in (None, row["cause"])]
        cells = [cell for text in TEXTS for cell in compared(some, text)]
        body.append([name or "all", str(len(some)), *cells])
    heads = ["what changes", "choices", *(f"{text}, {what}" for text in TEXTS for what in ("median", "correlation"))]
    first = rows[0]
    tokens = first["windows"] * first["seq_len"]
    return (
        f"{markdown(heads, body)}\nOne layer at a time, the residual stream rotated; measured: divergence from the "
        f"dense model in fp32, on {tokens} tokens of each text. Median: of measured over predicted "
        f"loss; correlation: Spearman's, of the two. `{first['model']}`, {first['device']}, {versions(first)}.\n"
    )


def pairs(rows: list[Row], text: str) -> list[tuple[float, float]]:
    """What each choice was predicted to cost, and what it did."""
    return [(sum(row["predicted"].values()), row["divergence"][text]) for row in rows]


def compared(rows: list[Row], text: str) -> tuple[str, str]:
    """Median of measured over predicted loss, and their rank correlation."""
    before, after = zip(*pairs(rows, text), strict=True)
    ratio = median(b / a for a, b in zip(before, after, strict=True))
    return f"{ratio:.2f}", f"{spearmanr(before, after).statistic:.2f}"
