"""The runtime against transformers, and a compressed model against the dense one, on one machine in one run.

    python -m bench.runtime --text wikitext-2-raw/test.txt --compressed out/global-0.6

Every round runs all contestants one after another on the same prompts, and the ratio is taken within the round, so
that whatever else the machine does hits all of them alike. Rows go to bench/results/cpu/runtime.jsonl.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rankwise import LLM, SamplingParams
from rankwise.engine.checkpoint import is_rankwise, open_checkpoint
from rankwise.provenance import versions
from rankwise.text import read_text
from rankwise.zoo import EMBEDDED, load_model, quiet_transformers

RESULTS = Path(__file__).parent / "results" / "cpu" / "runtime.jsonl"
Prompts = list[list[int]]


def main() -> None:
    """Measure every batch size, print and write."""
    options = parse()
    quiet_transformers()
    contestants, tokenizer, length = contest(options)
    ids = tokenizer(read_text(options.text, "test")).input_ids
    facts = {"bench": "runtime", "versions": versions(), "threads": torch.get_num_threads(), "model": options.model}
    facts |= {"dtype": options.dtype, "prompt": options.prompt, "new": options.new, "kept": kept(options.compressed)}
    for batch in options.batch:
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for round_ in range(-1, options.rounds):  # the first one warms up
            at = (round_ + 1) * batch * length
            prompts = [ids[(at + i * length) % (len(ids) - length) :][: options.prompt] for i in range(batch)]
            for name, run in contestants.items():
                started = time.perf_counter()
                run(prompts)
                if round_ >= 0:
                    seconds[name].append(time.perf_counter() - started)
        row = facts | {"batch": batch, "rounds": options.rounds} | figures(seconds, batch * options.new)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)  # noqa: T201


def contest(options: argparse.Namespace) -> tuple[dict[str, Callable[[Prompts], Any]], Any, int]:
    """What runs, the tokenizer, and the tokens of one request."""
    length = options.prompt + options.new
    params = SamplingParams(max_tokens=options.new, temperature=0, ignore_eos=True)
    kv = max(options.batch) * (length + 16)
    shared = {"dtype": options.dtype, "device": "cpu", "kv_tokens": kv, "max_model_len": length + 1}
    dense = LLM(options.model, **shared, prefix_caching=False)
    model, tokenizer = load_model(options.model, options.dtype, "cpu")

    @torch.inference_mode()
    def by_transformers(prompts: Prompts) -> Any:
        tensor = torch.tensor(prompts)
        return model.generate(tensor, max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False)

    found: dict[str, Callable[[Prompts], Any]] = {
        "transformers": by_transformers,
        "runtime": lambda prompts: dense.generate(prompts, params),
    }
    if options.compressed:
        small = LLM(options.compressed, **shared, prefix_caching=False)
        found["runtime, compressed"] = lambda prompts: small.generate(prompts, params)
    return found, tokenizer, length


def figures(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Tokens a second and ratios within a round, each as p20, p50 and p80."""
    pairs = [("runtime", "transformers"), ("runtime, compressed", "runtime"), ("runtime, compressed", "transformers")]
    rates = {name: quantiles([tokens / s for s in each]) for name, each in seconds.items()}
    ratios = {
        f"{ours} / {peer}": quantiles([p / o for o, p in zip(seconds[ours], seconds[peer], strict=True)])
        for ours, peer in pairs
        if ours in seconds
    }
    return {"tokens_per_second": rates, "ratios": ratios}


def quantiles(values: list[float]) -> list[float]:
    """p20, p50, p80."""
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return [round(v, 3) for v in torch.tensor(values, dtype=torch.float64).quantile(at).tolist()]


def kept(folder: str | None) -> float | None:
    """Share of the linear layers' parameters that a checkpoint keeps."""
    return open_checkpoint(folder)[0].ratio if folder and is_rankwise(folder) else None


def line(row: dict[str, Any]) -> str:
    """One line for a person."""
    rates = "  ".join(f"{name} {v[1]:.1f} tok/s" for name, v in row["tokens_per_second"].items())
    ratios = "  ".join(f"{name} {v[1]:.2f} ({v[0]:.2f} to {v[2]:.2f})" for name, v in row["ratios"].items())
    return f"batch {row['batch']:3}  {rates}  |  {ratios}"


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="prompts are cut from it")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--compressed", help="a rankwise folder of the same model")
    parser.add_argument("--batch", type=int, action="append", help="requests at once; repeatable [1 and 16]")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.batch = options.batch or [1, 16]
    return options


if __name__ == "__main__":
    main()
