"""Perplexity against bytes: 4 and 8 bits, ranks, and both chosen together, over a row of sizes, in one run.

    python -m bench.tradeoff --train wikitext-2-raw/train_1MB.txt --test wikitext-2-raw/test.txt --c4 c4.jsonl

Every row is the model with its residual stream rotated (`bench.rotation`), so that no weight lies on a 4-bit grid from
before; `--plain` measures the model as it comes, whose weights were rounded once. Curvature comes from the first
windows of the train text. Sizes are shares of the linear layers' bytes in bf16. Rounded layers and rows that are there
are not made again; rows go to bench/results/cpu/tradeoff.jsonl.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import CPU, kept_rows
from bench.rotation import rotate
from bench.sheet import append, made_of
from bench.texts import add_text_options, test_windows, train_windows
from rankwise.alloc.curvature import FORMAT, Curvature, collect
from rankwise.alloc.joint import joint_plan
from rankwise.alloc.methods import Global
from rankwise.alloc.precisions import RoundingTable, measure_rounding
from rankwise.alloc.rounder import Rounder
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.anatomy import block_linears, weight_of
from rankwise.budgets import make_budget
from rankwise.candidates import Candidate
from rankwise.compression import plan_bytes
from rankwise.config import CompressConfig
from rankwise.evaluate import perplexity
from rankwise.files import sha256
from rankwise.pipeline import compress
from rankwise.plan import KINDS, RankPlan
from rankwise.progress import on_terminal
from rankwise.provenance import versions
from rankwise.quantize import nearest
from rankwise.storage import Precision
from rankwise.weights import rounding_plan
from rankwise.windows import JUDGES
from rankwise.work import Work
from rankwise.zoo import EMBEDDED, load_model, model_dtype, quiet_transformers

RESULTS = Path(__file__).parent / "results"
CANDIDATES = 3
CHANNELS = 64  # widths of MLPs are multiples of it, where they may lose channels
SHARES = (0.5, 0.4, 0.35, 0.3, 0.27, 0.25, 0.22, 0.2)
BF16 = 16  # bits
PLAIN = ("dense", "lowrank")
UNIFORM = (Precision("int8"), Precision("int4", 64))  # of ranks that were chosen without them
NEAREST = (Precision("nf4"), Precision("int4", 32), Precision("int4", 32, asymmetric=True), Precision("int4", 64))
ALONE = (Precision("int8"), *NEAREST, Precision("int4", 64, asymmetric=True))


Made = RankPlan | Candidate | None  # None: the dense model, or a row that is not measured


@dataclass
class Bench:
    """What all rows share.

    Args:
        model: dense, bf16.
        curvature: of it.
        store: its factors.
        table: what rounding adds, by kind, rank and precision.
        folder: of all that and of layers that were rounded before.
        windows: `inputs` of the curvature and the table, and `judges`, which decide between plans whose predictions are
            near; what the plans are tested on are other ones.
        held_out: moments of the judges' inputs, which the guards of the rounding go by.
    """

    model: Any
    curvature: Curvature
    store: FactorStore
    table: RoundingTable
    folder: Path
    windows: dict[str, torch.Tensor]
    held_out: Curvature

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the linear layers, (out, in)."""
        return self.store.shapes

    @property
    def moments(self) -> str:
        """Digits that stand for the sums of the first block: rows are compared only if all saw the same."""
        return sha256(min((self.folder / "curvature").rglob("*.safetensors")))[:12]

    @property
    def dense_bytes(self) -> int:
        """Of the linear layers in bf16."""
        return sum(2 * m * n for m, n in self.shapes.values())

    def alone(self, precision: Precision) -> RankPlan:
        """Every layer dense, in one precision."""
        return rounding_plan(None, precision, self.shapes, "bf16")

    def chosen(self, share: float, precisions: tuple[Precision, ...], kinds: tuple[str, ...] = KINDS) -> RankPlan:
        """Kinds, ranks and precisions chosen together under a share of the dense bytes, by prediction."""
        budget = int(share * self.dense_bytes)
        return joint_plan(Global(kinds=kinds), self.store, self.table, precisions, budget, "bf16")

    def tried(self, share: float, channels: int = 0) -> Candidate:
        """As `rankwise compress` does it: the best three by prediction, judged on text; `channels` as the option."""
        budget = make_budget(None, share * BF16, "auto", None, False)
        method, nowhere = Global(channel_multiple=channels), self.folder / "unused"
        config = CompressConfig(EMBEDDED, nowhere, method, budget=budget, candidates=CANDIDATES, device="cpu")
        work = Work(config, self.model, None, self.windows, self.folder, on_terminal)
        return plan_bytes(work, self.store, self.curvature)

    def rounder(self) -> Rounder:
        """Rounding by what the curvature says."""
        blocks = [list(block) for block in block_linears(self.model)]
        dense = self.model.get_submodule
        rounded = self.folder / "rounded"
        return Rounder(self.curvature, blocks, rounded, lambda n: weight_of(dense(n)), held_out=self.held_out)

    def on_top(self, share: float, precision: Precision) -> RankPlan | None:
        """Ranks for bf16, all numbers rounded alike afterwards; None where that needs no ranks, or would cost half."""
        ratio = share * BF16 / (8 * self.alone(precision).bytes / sum(m * n for m, n in self.shapes.values()))
        if not 0.5 < ratio < 1:
            return None
        while True:  # what the scales take depends on the ranks
            method = Global(ratio=ratio, kinds=PLAIN, rank_multiple=max(8, precision.block), tolerance=0.01)
            plan = method.allocate(self.store, "bf16").stored_as(precision)
            if plan.bytes <= share * self.dense_bytes:
                return plan
            ratio *= 0.9999 * share * self.dense_bytes / plan.bytes

    def measure(self, made: Made, rounding: str, tests: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Carry a plan out and test it."""
        model, started = self.model, time.monotonic()
        plan = made.plan if isinstance(made, Candidate) else made
        if plan is not None:
            model, store = copy.deepcopy(self.model), self.store
            rule = self.rounder() if rounding == "feedback" else nearest
            if isinstance(made, Candidate):
                store, rule = made.store, made.rounding
            compress(model, plan, store, rounding=rule, track=on_terminal)
        facts = {"seconds": round(time.monotonic() - started, 1), "rounding": rounding}
        if plan is not None:
            facts |= {"bytes": plan.bytes, "share": plan.bytes / self.dense_bytes, "bits": plan.bits}
            facts |= {"made_of": made_of(plan)}
            facts |= {"predicted": plan.loss, "candidates": plan.provenance.get("candidates")}
        return facts | {
            "perplexity": {name: perplexity(model, test, track=on_terminal) for name, test in tests.items()}
        }


Row = tuple[str, float | None, Callable[[Bench], Made], str]  # name, share of the bytes, plan, rounding


def rows() -> list[Row]:
    """All of them; a row whose plan is None but for the dense model is not measured."""
    bf16 = (Precision("bf16"),)
    found: list[Row] = [("dense", None, lambda b: None, "")]
    for precision in NEAREST:
        found += [(f"{precision}, nearest", None, lambda b, p=precision: b.alone(p), "nearest")]
    for precision in ALONE:
        found += [(str(precision), None, lambda b, p=precision: b.alone(p), "feedback")]
    for share in SHARES:
        found += [("chosen together", share, lambda b, s=share: b.tried(s), "feedback")]
        found += [("chosen together, channels too", share, lambda b, s=share: b.tried(s, CHANNELS), "feedback")]
        found += [("pivot and dense, bf16", share, lambda b, s=share: b.chosen(s, bf16), "")]
        found += [("lowrank and dense, bf16", share, lambda b, s=share: b.chosen(s, bf16, PLAIN), "")]
        for precision in UNIFORM:
            name = f"ranks, then {precision}"
            found += [(name, share, lambda b, s=share, p=precision: b.on_top(s, p), "feedback")]
    return found


def main() -> None:
    """Measure every row that is missing."""
    options = parse()
    quiet_transformers()
    model, tokenizer = load(options)
    facts = identity(options)
    before = [row for row in kept_rows(options.out, facts) if row["plain"] == options.plain]
    if any("moments" not in row for row in before):
        sys.exit(f"{options.out} holds rows that do not say which moments they saw: give --out, or remove it")
    bench = prepare(model, tokenizer, options)
    facts |= {"moments": bench.moments}
    if any(row["moments"] != bench.moments for row in before):
        sys.exit(f"{options.out} holds rows of other moments than those in {bench.folder}: give --out, or remove it")
    there = {(row["name"], row["asked"]) for row in before}
    tests = {domain: test_windows(domain, options, tokenizer) for domain in ("wikitext2", "c4")}
    for name, share, make, rounding in rows():
        if (name, share) in there or not wanted(name, share, options):
            continue
        made = make(bench)
        if made is None and name != "dense":
            continue
        row = facts | {"name": name, "asked": share, "plain": options.plain} | bench.measure(made, rounding, tests)
        append(options.out, row)
        figures = "  ".join(f"{test} {value:.2f}" for test, value in row["perplexity"].items())
        print(f"{name:28} {row.get('share', 1):.4f}  {figures}  {row['seconds']:.0f} s", flush=True)  # noqa: T201


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model that is measured, in bf16, and its tokenizer."""
    if options.plain:
        return load_model(options.model, "bf16")
    model, tokenizer = load_model(options.model, "fp32")
    rotate(model)
    return model.bfloat16(), tokenizer


def prepare(model: Any, tokenizer: Any, options: argparse.Namespace) -> Bench:
    """Curvature, factors and the table of rounding losses, made or found."""
    train = train_windows("wikitext2", options, tokenizer)
    inputs, gradients = train[: options.samples], train[: options.gradient_samples]
    judges = train[max(options.samples, options.gradient_samples) :][:JUDGES]
    work = options.work / ("plain" if options.plain else "rotated")
    curvature = collect(model, inputs, gradients, work / "curvature", device=CPU, track=on_terminal)
    store = factorize_model(model, curvature, work / "factors", sides="two", device=CPU, track=on_terminal)
    precisions, place = automatic(model_dtype(model)), work / "rounding"
    table = measure_rounding(model, curvature, store, precisions, KINDS, place, device=CPU, track=on_terminal)
    held_out = collect(model, judges, judges, work / "held_out", device=CPU, track=on_terminal)
    return Bench(model, curvature, store, table, work, {"inputs": inputs, "judges": judges}, held_out)


def automatic(dtype: str) -> tuple[Precision, ...]:
    """What a budget of bytes chooses from, unless told otherwise, for a model of one dtype."""
    budget = make_budget(None, BF16, "auto", None, False)
    assert budget is not None
    return budget.for_model(dtype)


def wanted(name: str, share: float | None, options: argparse.Namespace) -> bool:
    """Whether this command measures a row."""
    named = not options.only or any(part == f"={name}" or part in name for part in options.only)
    return named and (share is None or not options.at or share in options.at)


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """What every row of a run carries."""
    keys = ("model", "samples", "gradient_samples", "seq_len", "windows")
    texts = {key: Path(getattr(options, key)).name for key in ("train", "test", "c4")}
    return {"bench": "tradeoff", "device": "cpu", "versions": versions(), "curvature": FORMAT, **texts} | {
        key: getattr(options, key) for key in keys
    }


def parse(out: Path = RESULTS / "cpu" / "tradeoff.jsonl") -> argparse.Namespace:
    """Options of the command line; rows go to `out` unless they say otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--plain", action="store_true", help="the model as it comes, not rotated")
    parser.add_argument(
        "--only", action="append", help="the rows whose name contains this, or is it after =; repeatable"
    )
    parser.add_argument("--at", action="append", type=float, help="the rows of this size; repeatable")
    parser.add_argument("--samples", type=int, default=64, help="windows for the input moments")
    parser.add_argument("--gradient-samples", type=int, default=24, help="windows for the output gradients")
    parser.add_argument("--work", type=Path, default=Path("build/tradeoff"), help="curvature, factors, rounded layers")
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args()


if __name__ == "__main__":
    main()
