"""The runtime against transformers, and a compressed model against the dense one, as rows of the documentation's table.

    python -m bench.runtime --compressed out/global-0.6

What is measured, and how, is `rankwise bench` itself; here its rows are put together by batch size and appended to
bench/results/cpu/runtime.jsonl.
"""

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench.sheet import append, made_of, with_spread
from rankwise.bench import BenchConfig, bench, line_up
from rankwise.bench.summary import spread
from rankwise.engine.checkpoint import is_rankwise, open_checkpoint
from rankwise.progress import on_terminal
from rankwise.provenance import versions
from rankwise.zoo import EMBEDDED

NAMES = {"rankwise": "runtime", "vllm": "vLLM"}
PAIRS = (("runtime", "transformers"), ("runtime, compressed", "runtime"), ("runtime, compressed", "transformers"))
RESULTS = Path(__file__).parent / "results" / "cpu" / "runtime.jsonl"


def main() -> None:
    """Measure every batch size, print and write."""
    options = parse()
    models = [options.model, *([options.compressed] if options.compressed else [])]
    contestants = [c for c in line_up(models, ["transformers", "rankwise"]) if c.model == options.model or is_own(c)]
    shape = {"prompts": (options.prompt,), "batches": tuple(options.batch), "new_tokens": options.new}
    config = BenchConfig(**shape, rounds=options.rounds, device="cpu", dtype=options.dtype)
    found = bench(contestants, config, track=on_terminal)
    facts = {"bench": "runtime", "versions": versions(), "threads": torch.get_num_threads(), "model": options.model}
    facts |= {"dtype": options.dtype, "prompt": options.prompt, "new": options.new} | described(options.compressed)
    for batch, rows in groupby(found["rows"], lambda row: row["batch"]):
        row = facts | {"batch": batch, "rounds": options.rounds} | figures(list(rows), options.compressed)
        append(options.out, row)
        print(line(row), flush=True)  # noqa: T201


def is_own(contestant: Any) -> bool:
    """Whether our engine runs it: the compressed model is not measured in transformers."""
    return bool(contestant.engine == "rankwise")


def figures(
    rows: list[dict[str, Any]], compressed: str | None, pairs: Sequence[tuple[str, str]] = PAIRS
) -> dict[str, Any]:
    """Tokens a second and ratios within a round, each as p20, p50 and p80."""
    rates = {label(row, compressed): row["tokens_per_s_by_round"] for row in rows}
    ratios = {
        f"{ours} / {peer}": [a / b for a, b in zip(rates[ours], rates[peer], strict=True)]
        for ours, peer in pairs
        if ours in rates
    }
    spreads = {"tokens_per_second": rates, "ratios": ratios}
    return {key: {name: rounded(spread(each)) for name, each in value.items()} for key, value in spreads.items()}


def label(row: dict[str, Any], compressed: str | None) -> str:
    """A contestant's name in the table."""
    name = NAMES.get(row["engine"], row["engine"])
    return f"{name}, compressed" if row["name"] == compressed else name


def rounded(values: list[float]) -> list[float]:
    """To three places."""
    return [round(value, 3) for value in values]


def described(folder: str | None) -> dict[str, Any]:
    """Of a checkpoint: the share of the linear layers' parameters that it keeps, their bits, and what they are."""
    if not folder or not is_rankwise(folder):
        return {"kept": None}
    plan = open_checkpoint(folder)[0]
    return {"kept": plan.ratio, "bits": plan.bits, "made_of": made_of(plan)}


def line(row: dict[str, Any]) -> str:
    """One line for a person."""
    rates = "  ".join(f"{name} {v[1]:.1f} tok/s" for name, v in row["tokens_per_second"].items())
    ratios = "  ".join(f"{name} {with_spread(v)}" for name, v in row["ratios"].items())
    return f"batch {row['batch']:3}  {rates}  |  {ratios}"


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--compressed", help="a rankwise folder of the same model")
    return parse_shape(parser, RESULTS)


def parse_shape(parser: argparse.ArgumentParser, out: Path) -> argparse.Namespace:
    """What is timed, and where rows go: options that both benches of speed have."""
    parser.add_argument("--batch", type=int, action="append", help="requests at once; repeatable [1 and 16]")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    options.batch = options.batch or [1, 16]
    return options


if __name__ == "__main__":
    main()
