"""Speculative decoding against the dense model alone: same tokens, how many guesses stay, and what it is worth.

    python -m bench.speculative --text wikitext-2-raw/test.txt --draft out/global-0.6

One prompt is a round: the dense model alone and the dense model with the draft continue it one after the other, the
order changing from round to round, and the ratio is taken within the round. One row goes to
bench/results/cpu/speculative.jsonl.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from bench.sheet import append
from rankwise import LLM, SamplingParams
from rankwise.engine.checkpoint import is_rankwise, open_checkpoint
from rankwise.provenance import versions
from rankwise.text import read_text
from rankwise.zoo import EMBEDDED, quiet_transformers

RESULTS = Path(__file__).parent / "results" / "cpu" / "speculative.jsonl"


def main() -> None:
    """Measure, print and write."""
    options = parse()
    quiet_transformers()
    length = options.prompt + options.new
    shared = {"dtype": options.dtype, "device": "cpu", "max_model_len": length + 1, "kv_tokens": 2 * length + 32}
    alone = LLM(options.model, **shared, prefix_caching=False)
    drafting = LLM(
        options.model, **shared, prefix_caching=False, draft=options.draft, draft_tokens=options.draft_tokens
    )
    rounds = measure(alone, drafting, cut(alone.tokenizer, options), options.new)
    row = facts(options) | figures(rounds, drafting)
    append(options.out, row)
    print(line(row), flush=True)  # noqa: T201


def cut(tokenizer: Any, options: argparse.Namespace) -> list[list[int]]:
    """Prompts that begin at even distances in the text; the last one only warms up."""
    ids, count = tokenizer(read_text(options.text, "test")).input_ids, options.prompts + 1
    if len(ids) < options.prompt + count:
        raise SystemExit(f"--text: {len(ids)} tokens; too few for {count} prompts of {options.prompt}")
    step = (len(ids) - options.prompt) // count
    return [ids[at * step : at * step + options.prompt] for at in range(count)]


def measure(alone: LLM, drafting: LLM, prompts: list[list[int]], new: int) -> list[dict[str, Any]]:
    """Tokens and seconds of both contestants for each prompt but the last."""
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    contestants, rounds = {"alone": alone, "drafting": drafting}, []
    for number, prompt in enumerate([prompts[-1], *prompts[:-1]]):
        found: dict[str, Any] = {}
        for name in sorted(contestants, reverse=bool(number % 2)):
            started = time.perf_counter()
            tokens = contestants[name].generate(prompt, params)[0].tokens
            found[name] = tokens, time.perf_counter() - started
        if number:
            rounds.append(found)
        else:
            tally = drafting.speculation
            assert tally is not None
            tally.drafted = tally.accepted = tally.checks = 0
    return rounds


def figures(rounds: list[dict[str, Any]], drafting: LLM) -> dict[str, Any]:
    """What the rounds came to; spreads are p20, p50 and p80."""
    tally = drafting.speculation
    assert tally is not None
    pairs = [(found["alone"], found["drafting"]) for found in rounds]
    return {
        "equal": sum(one[0] == other[0] for one, other in pairs),
        "acceptance": round(tally.acceptance, 4),
        "tokens_per_check": round(tally.tokens_per_check, 3),
        "tokens_per_second": {
            name: quantiles([len(found[name][0]) / found[name][1] for found in rounds]) for name in rounds[0]
        },
        "ratio": quantiles([one[1] / other[1] for one, other in pairs]),
    }


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What was run."""
    kept = open_checkpoint(options.draft)[0].ratio if is_rankwise(options.draft) else None
    names = ("model", "dtype", "prompts", "prompt", "new", "draft_tokens")
    about = {"bench": "speculative", "versions": versions(), "threads": torch.get_num_threads(), "kept": kept}
    return about | {name: getattr(options, name) for name in names}


def quantiles(values: list[float]) -> list[float]:
    """p20, p50, p80."""
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return [round(v, 3) for v in torch.tensor(values, dtype=torch.float64).quantile(at).tolist()]


def line(row: dict[str, Any]) -> str:
    """One line for a person."""
    low, middle, high = row["ratio"]
    rates = "  ".join(f"{name} {v[1]:.1f} tok/s" for name, v in row["tokens_per_second"].items())
    return (
        f"{row['equal']} of {row['prompts']} outputs equal  acceptance {row['acceptance']:.1%}  "
        f"{row['tokens_per_check']:.2f} tokens a pass  |  {rates}  ratio {middle:.2f} ({low:.2f} to {high:.2f})"
    )


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="prompts are cut from it")
    parser.add_argument("--draft", required=True, help="a rankwise folder of the same model")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
