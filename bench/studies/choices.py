"""Does the predicted loss of a choice, a layer's kind, rank and precision, tell what it costs? One layer at a time.

    python -m bench.studies.choices --train wikitext-2-raw/train_1MB.txt --test wikitext-2-raw/test.txt --c4 c4.jsonl

Moments, factors and the table of rounding are those of `bench.tradeoff` (give its `--work`), made there or here.
Choices are drawn with a seed; every one is carried out alone in the otherwise dense model. What it costs is the
divergence from the dense model on a window of each text that nothing was fitted to, numbers as stored and computed with
in fp32: of single layers, the perplexity of as many tokens would tell noise, and so does a divergence in bf16.
Rows go to bench/results/cpu/studies.choices.jsonl; interrupted, the same command goes on.
"""

import copy
import random
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from torch.nn.functional import kl_div

from bench import tradeoff
from bench.byte_tables import CAUSES, pairs
from bench.harness import kept_rows
from bench.sheet import append
from bench.studies.plots import figure
from bench.texts import test_windows
from rankwise.alloc.joint import Trust, priced
from rankwise.alloc.methods import Global
from rankwise.pipeline import compress
from rankwise.plan import KINDS, LayerSpec, RankPlan, layer_parameters
from rankwise.progress import on_terminal
from rankwise.storage import Precision
from rankwise.zoo import quiet_transformers

COUNT = 96  # choices, each of another layer
STEP = 64  # ranks are multiples of it, which blocks of all precisions but int4 by 128 divide
SHARES = (0.2, 0.8)  # of the full rank, between which ranks are drawn
WINDOWS = 1  # of each text


def draw(shapes: dict[str, tuple[int, int]], count: int, seed: int = 0) -> list[tuple[str, LayerSpec]]:
    """Layers, and what each becomes; nothing larger than dense, nothing that stays as it is."""
    dice = random.Random(seed)
    found: dict[str, LayerSpec] = {}
    precisions = [p for p in tradeoff.automatic("bf16") if p.group != 128]
    while len(found) < count:
        name, kind, precision = dice.choice(list(shapes)), dice.choice(KINDS), dice.choice(precisions)
        m, n = shapes[name]
        full = min(m, n)
        rank = full if kind == "dense" else max(1, round(full * dice.uniform(*SHARES) / STEP)) * STEP
        if (kind == "dense" and not precision.quantised) or n % precision.block:
            continue
        if layer_parameters(kind, rank, m, n) <= m * n and name not in found:
            found[name] = LayerSpec(kind, m, n, rank).stored_as(precision)
    return list(found.items())


def predicted(bench: tradeoff.Bench, name: str, spec: LayerSpec) -> dict[str, float]:
    """Both parts of what `joint_plan` predicts, in nats a token, as they are before `Trust` weighs them."""
    parts = {}
    for part, trust in (("ranks", Trust(1, 0)), ("rounding", Trust(0, 1))):
        plan = priced(RankPlan({name: spec}), Global(), bench.store, bench.table, trust)
        parts[part] = float(plan.layers[name].loss)
    return parts


def alone(bench: tradeoff.Bench, name: str, spec: LayerSpec) -> RankPlan:
    """A plan in which one layer changes."""
    dense = bench.alone(Precision("bf16"))
    return RankPlan({**dict(dense), name: spec})


@torch.no_grad()
def logprobs(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[T, vocab]` fp32 of a window's next tokens."""
    return model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)


def divergence(model: Any, window: torch.Tensor, known: torch.Tensor) -> float:
    """Kullback-Leibler divergence of a model from the one whose log-probabilities are known, nats a token."""
    return float(kl_div(logprobs(model, window), known, reduction="sum", log_target=True)) / len(window)


def measure(
    bench: tradeoff.Bench, name: str, spec: LayerSpec, tests: dict[str, torch.Tensor], dense: dict[str, Any]
) -> dict[str, float]:
    """Divergence of the model with one layer changed from the dense one, on each text, nats a token."""
    model = copy.deepcopy(bench.model)
    compress(model, alone(bench, name, spec), bench.store, rounding=bench.rounder())
    torch.nn.Module.float(model)  # transformers' own refuses coded models
    return {
        text: fmean(divergence(model, window, known) for window, known in zip(windows, dense[text], strict=True))
        for text, windows in tests.items()
    }


def cause(foreseen: dict[str, float], spec: LayerSpec) -> str:
    """What a choice changes; `foreseen` is what was predicted."""
    coded, cut = foreseen["rounding"] > 0, spec.kind != "dense"
    return CAUSES[2] if coded and cut else CAUSES[1] if coded else CAUSES[0]


def drawn(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Measured against predicted nats."""
    for name in CAUSES:
        points = pairs([row for row in rows if row["cause"] == name], "wikitext2")
        axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, linestyle="", label=name)
    axes.axline((1e-3, 1e-3), (1e-1, 1e-1), color="grey", linewidth=0.8)
    axes.set(xlabel="predicted loss of one layer, nats a token", ylabel="measured")
    axes.legend()


def main() -> None:
    """Measure every choice that is missing, and draw."""
    options = tradeoff.parse(tradeoff.RESULTS / "cpu" / "studies.choices.jsonl")
    quiet_transformers()
    model, tokenizer = tradeoff.load(options)
    bench = tradeoff.prepare(model, tokenizer, options)
    own = {"bench": "studies.choices", "plain": options.plain, "moments": bench.moments, "windows": WINDOWS}
    facts = tradeoff.identity(options) | own
    rows = kept_rows(options.out, facts)
    there = {(row["layer"], row["kind"], row["rank"], row["precision"]) for row in rows}
    tests = {text: test_windows(text, options, tokenizer)[:WINDOWS] for text in ("wikitext2", "c4")}
    exact = copy.deepcopy(bench.model).float()
    dense = {text: [logprobs(exact, window) for window in windows] for text, windows in tests.items()}
    todo = draw(bench.shapes, COUNT)
    with on_terminal("choices", len(todo)) as advance:
        for name, spec in todo:
            key = (name, spec.kind, spec.rank, str(spec.precision))
            if key not in there:
                foreseen = predicted(bench, name, spec)
                row = facts | dict(zip(("layer", "kind", "rank", "precision"), key, strict=True))
                row |= {"cause": cause(foreseen, spec), "predicted": foreseen}
                rows.append(row | {"divergence": measure(bench, name, spec, tests, dense)})
                append(options.out, rows[-1])
            advance()
    figure("predicted-choices", lambda axes: drawn(axes, rows))


if __name__ == "__main__":
    main()
