"""Compressed models, then nf4: what rounding to 4 bits adds on top of each method's ranks.

    python -m bench.then_nf4 --train ... --test ... --c4 ... --work DIR --names "ARA, mended" "LLRC, any-k" rankwise

Takes plans, factors and refits from the folder in which `bench.methods` made them (its `--work`), tests each model in
bf16 and again with all its matrices rounded to the nearest nf4 codes; blocks of 64 run along rows, and the last block
of a row may be shorter, so ranks stay what they were. `--save DIR` also writes the bf16 models as checkpoints. Rows go
to bench/results/cpu/then_nf4.jsonl.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.harness import Case, calibrate, identity, kept_rows, metric, parse, refit_texts, refitted, require_metric
from bench.methods import cases
from bench.sheet import append
from bench.texts import test_windows
from rankwise.anatomy import weight_of
from rankwise.engine.checkpoint import save
from rankwise.evaluate import perplexity
from rankwise.kernels.nf4 import BLOCK, dequantize_nf4, quantize_nf4
from rankwise.pipeline import compress, tensor_bytes
from rankwise.plan import RankPlan
from rankwise.progress import on_terminal
from rankwise.zoo import load_model, quiet_transformers

RATIO = 0.8
FACTORS = ("lowrank_u", "lowrank_v", "pivot_basis", "pivot_coeff")


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """What nf4 makes of a matrix `[m, n]`; zeros fill the last block of each row for as long as it is rounded."""
    short = -matrix.shape[1] % BLOCK
    return dequantize_nf4(quantize_nf4(functional.pad(matrix.float(), (0, short))))[:, : matrix.shape[1]]


@torch.no_grad()
def round_model(model: Any, plan: RankPlan) -> None:
    """Round every matrix of the plan's layers in place."""
    for name, spec in plan:
        layer = model.get_submodule(name)
        for part in [weight_of(layer)] if spec.kind == "dense" else [getattr(layer, f, None) for f in FACTORS]:
            if part is not None:
                part.copy_(rounded(part))


def build(case: Case, options: argparse.Namespace) -> tuple[Any, Any, RankPlan]:
    """The row's model as `bench.methods` tested it, its tokenizer and plan."""
    model, tokenizer = load_model(options.model, options.dtype)
    calibration, _ = calibrate(case, model, tokenizer, options)
    plan = RankPlan.load(options.work / "plans" / f"{case.key}.json")
    fit, judges = refit_texts(case, calibration, tokenizer, options)
    factors = refitted(calibration, plan, fit, judges, options.work) if case.refit else calibration.factors
    compress(model, plan, factors, track=on_terminal)
    return model, tokenizer, plan


def find(name: str) -> Case:
    """The row of `bench.methods` at the ratio of this bench."""
    found = [case for case in cases() if case.name == name and (case.ratio == RATIO or not case.method)]
    if not found:
        raise SystemExit(f"{name}: no row of bench.methods at {RATIO}")
    return found[0]


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexities of one row in bf16 and in nf4."""
    if case.method:
        model, tokenizer, plan = build(case, options)
    else:
        model, tokenizer = load_model(options.model, options.dtype)
        other = next(case for case in cases() if case.method)  # any plan names the layers
        whole = RankPlan.load(options.work / "plans" / f"{other.key}.json")
        plan = RankPlan({n: type(s)("dense", s.out_features, s.in_features, s.full_rank) for n, s in whole})
    if options.save and case.method:
        plan.other_bytes, out = tensor_bytes(model) - plan.bytes, options.save / case.key
        save(model, tokenizer, plan, out, staging=options.save / f".{case.key}")
    tests = {domain: test_windows(domain, options, tokenizer) for domain in ("wikitext2", "c4")}
    figures = {}
    for precision in ("bf16", "nf4"):
        if precision == "nf4":
            round_model(model, plan)
        figures[precision] = {test: perplexity(model, windows, track=on_terminal) for test, windows in tests.items()}
    return {"name": case.name, "ratio": plan.ratio, "perplexity": figures}


def main() -> None:
    """Measure the rows that are missing."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--names", nargs="+", required=True)
    extra.add_argument("--save", type=Path)
    own, rest = extra.parse_known_args()
    options = parse("then_nf4", str(__doc__), rest)
    options.save = own.save
    quiet_transformers()
    facts = identity("then_nf4", options)
    rows = kept_rows(options.out, facts)
    there = {row["name"] for row in rows}
    require_metric(rows, {name: metric(find(name), options) for name in there}, options.out, key="name")
    for name in own.names:
        if name in there:
            continue
        case = find(name)
        row = facts | metric(case, options) | measure(case, options)
        append(options.out, row)
        print(name, row["perplexity"], flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
