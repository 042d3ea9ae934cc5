"""Does the predicted loss of a choice, a layer's kind, rank and precision, tell what it costs? One layer at a time.

    python -m bench.studies.choices --train wikitext-2-raw/train_1MB.txt --test wikitext-2-raw/test.txt --c4 c4.jsonl

Moments, factors and the table of rounding are those of `bench.tradeoff` (give its `--work`), made there or here.
Choices are drawn with a seed; every one is carried out alone in the otherwise dense model and tested. Rows go to
bench/results/cpu/studies.choices.jsonl; interrupted, the same command goes on.
"""

import copy
import json
import math
import random
from typing import Any

from matplotlib.axes import Axes
from scipy.stats import spearmanr

from bench import tradeoff
from bench.harness import kept_rows
from bench.studies.plots import figure
from bench.texts import test_windows
from rankwise.alloc.joint import Trust, priced
from rankwise.alloc.methods import Global
from rankwise.budgets import make_budget
from rankwise.evaluate import perplexity
from rankwise.pipeline import compress
from rankwise.plan import KINDS, LayerSpec, RankPlan, layer_parameters
from rankwise.progress import on_terminal
from rankwise.storage import Precision
from rankwise.zoo import quiet_transformers

COUNT = 96  # choices, each of another layer
STEP = 64  # ranks are multiples of it, which blocks of all precisions but int4 by 128 divide
SHARES = (0.2, 0.8)  # of the full rank, between which ranks are drawn
CAUSES = ("ranks", "rounding", "ranks and rounding")


def draw(shapes: dict[str, tuple[int, int]], count: int, seed: int = 0) -> list[tuple[str, LayerSpec]]:
    """Layers, and what each becomes; nothing larger than dense, nothing that stays as it is."""
    budget, dice, found = make_budget(None, 4.0, "auto", None, False), random.Random(seed), []
    assert budget is not None
    precisions = [p for p in budget.for_model("bf16") if p.group != 128]
    while len(found) < count:
        name, kind, precision = dice.choice(list(shapes)), dice.choice(KINDS), dice.choice(precisions)
        m, n = shapes[name]
        full = min(m, n)
        rank = full if kind == "dense" else max(1, round(full * dice.uniform(*SHARES) / STEP)) * STEP
        if (kind == "dense" and not precision.quantised) or n % precision.block:
            continue
        if layer_parameters(kind, rank, m, n) <= m * n and all(entry[0] != name for entry in found):
            found.append((name, LayerSpec(kind, m, n, rank).stored_as(precision)))
    return found


def predicted(bench: tradeoff.Bench, name: str, spec: LayerSpec) -> dict[str, float]:
    """Both parts of what `joint_plan` predicts, in nats a token, as they are before `Trust` weighs them."""
    whole = dict(alone(bench, name, spec))
    parts = {}
    for part, trust in (("ranks", Trust(1, 0)), ("rounding", Trust(0, 1))):
        plan = priced(RankPlan(whole), Global(), bench.store, bench.table, trust)
        parts[part] = float(plan.layers[name].loss)
    return parts


def alone(bench: tradeoff.Bench, name: str, spec: LayerSpec) -> RankPlan:
    """A plan in which one layer changes."""
    dense = bench.alone(Precision("bf16"))
    return RankPlan({**dict(dense), name: spec})


def measure(bench: tradeoff.Bench, name: str, spec: LayerSpec, tests: dict[str, Any]) -> dict[str, float]:
    """Perplexities of the model with one layer changed."""
    model = copy.deepcopy(bench.model)
    compress(model, alone(bench, name, spec), bench.store, rounding=bench.rounder())
    return {text: perplexity(model, windows) for text, windows in tests.items()}


def cause(row: dict[str, Any]) -> str:
    """What a choice changes."""
    coded, cut = row["predicted"]["rounding"] > 0, row["kind"] != "dense"
    return CAUSES[2] if coded and cut else CAUSES[1] if coded else CAUSES[0]


def nats(row: dict[str, Any], dense: dict[str, float], text: str = "wikitext2") -> float:
    """What a choice cost, a token."""
    return math.log(row["perplexity"][text] / dense[text])


def drawn(axes: Axes, rows: list[dict[str, Any]], dense: dict[str, float]) -> None:
    """Measured against predicted nats; below a ten-thousandth they are noise and lie on the edge."""
    for name in CAUSES:
        own = [row for row in rows if cause(row) == name]
        points = [(sum(row["predicted"].values()), max(1e-4, nats(row, dense))) for row in own]
        axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, linestyle="", label=name)
    axes.axline((1e-3, 1e-3), (1e-1, 1e-1), color="grey", linewidth=0.8)
    every = [(sum(row["predicted"].values()), nats(row, dense)) for row in rows]
    rank = spearmanr(*zip(*every, strict=True)).statistic
    axes.set(
        xlabel="predicted loss of one layer, nats a token", ylabel="measured", title=f"rank correlation {rank:.3f}"
    )
    axes.legend()


def main() -> None:
    """Measure every choice that is missing, and draw."""
    options = tradeoff.parse(tradeoff.RESULTS / "cpu" / "studies.choices.jsonl")
    quiet_transformers()
    model, tokenizer = tradeoff.load(options)
    bench = tradeoff.prepare(model, tokenizer, options)
    own = {"bench": "studies.choices", "plain": options.plain, "moments": bench.moments}
    facts = tradeoff.identity(options) | own
    rows = kept_rows(options.out, facts)
    there = {(row["layer"], row["kind"], row["rank"], row["precision"]) for row in rows}
    tests = {text: test_windows(text, options, tokenizer) for text in ("wikitext2", "c4")}
    todo = [("", None), *draw(bench.shapes, COUNT)]
    with on_terminal("choices", len(todo)) as advance:
        for name, spec in todo:
            key = (name, "", 0, "") if spec is None else (name, spec.kind, spec.rank, str(spec.precision))
            if key not in there:
                row = facts | dict(zip(("layer", "kind", "rank", "precision"), key, strict=True))
                row["predicted"] = {} if spec is None else predicted(bench, name, spec)
                found = None if spec is None else measure(bench, name, spec, tests)
                row["perplexity"] = found or {text: perplexity(bench.model, windows) for text, windows in tests.items()}
                rows.append(row)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            advance()
    dense = next(row["perplexity"] for row in rows if not row["layer"])
    changed = [row for row in rows if row["layer"]]
    figure("predicted-choices", lambda axes: drawn(axes, changed, dense))
    for name in CAUSES:
        some = [row for row in changed if cause(row) == name]
        ratio = sum(nats(r, dense) for r in some) / (sum(sum(r["predicted"].values()) for r in some) or math.nan)
        print(f"{name}: {len(some)} choices, measured over predicted {ratio:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
