"""Greedy tokens of the runtime against transformers, in fp32, while everything that can happen does.

    python -m bench.equality --text wikitext-2-raw/test.txt --compressed out/global-0.6

Prompts of several lengths, half of which begin alike; steps so small that prompts come in chunks, a cache so small that
sequences are preempted, other requests that are cancelled midway. A token counts as equal if it is the likeliest one
by transformers' logits of the same prompt and the tokens before it: where all are equal, greedy decoding has the same
output. Rows go to bench/results/cpu/equality.jsonl.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from bench.sheet import append
from rankwise import LLM, SamplingParams
from rankwise.engine.runtime.sequence import Sequence
from rankwise.progress import on_terminal
from rankwise.provenance import versions
from rankwise.text import read_text
from rankwise.zoo import EMBEDDED, load_model, quiet_transformers

RESULTS = Path(__file__).parent / "results" / "cpu" / "equality.jsonl"
LENGTHS = (23, 64, 17, 120, 40)
COMMON = 48  # tokens that every second prompt begins with
BLOCK, STEP = 16, 96  # tokens of a block and of a step
CANCEL_EVERY = 7  # steps between two cancellations


def main() -> None:
    """Measure each model at each batch size."""
    options = parse()
    quiet_transformers()
    for name in (options.model, *options.compressed):
        model, tokenizer = load_model(name, "fp32", "cpu")
        made = prompts(tokenizer(read_text(options.text, "test")).input_ids, options.prompts)
        for batch in options.batch:
            sequences, facts = run(name, made, batch, options.new)
            equal = sum(follows(model, s.prompt, s.output) for s in sequences)
            row = {"bench": "equality", "versions": versions(), "model": Path(name).name, "prompts": len(made)}
            row |= {"new": options.new, "batch": batch, "equal": equal} | facts
            append(options.out, row)
            print(row, flush=True)  # noqa: T201


def prompts(ids: list[int], count: int) -> list[list[int]]:
    """Pieces of a text, of several lengths; every second one begins with the text's first tokens."""
    starts = [COMMON + 150 * at for at in range(count)]
    pieces = [ids[start : start + LENGTHS[at % len(LENGTHS)]] for at, start in enumerate(starts)]
    return [ids[:COMMON] + piece if at % 2 else piece for at, piece in enumerate(pieces)]


def run(name: str, made: list[list[int]], batch: int, new: int) -> tuple[list[Sequence], dict[str, Any]]:
    """Finished requests, and what happened to them."""
    tokens = (max(map(len, made)) + new) * max(1, batch // 6)  # room for a sixth of them at full length
    shared = {"max_model_len": 512, "kv_tokens": tokens, "max_sequences": batch, "block_size": BLOCK}
    llm = LLM(name, dtype="fp32", device="cpu", max_batched_tokens=STEP, **shared)
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    engine, started = llm.engine, time.monotonic()
    wanted, victims = [], []
    for at, prompt in enumerate(made):
        wanted.append(engine.add(prompt, params))
        if at % 4 == 0:
            victims.append(engine.add(prompt[::-1], params))
    with on_terminal("requests", len(wanted)) as advance:
        finished = 0
        for step, _ in enumerate(engine.run()):
            running = [victim for victim in victims if victim.output and not victim.finish_reason]
            if step % CANCEL_EVERY == 0 and running:
                engine.cancel(running[0])
            for _ in range(sum(bool(s.finish_reason) for s in wanted) - finished):
                finished += 1
                advance()
    assert engine.pool.available() == engine.pool.count, "blocks were not given back"
    facts = {
        "preempted": sum(s.preempted for s in wanted),
        "cached_tokens": sum(s.cached for s in wanted),
        "cancelled": sum(v.finish_reason == "cancelled" for v in victims),
        "chunked": sum(len(s.prompt) > STEP for s in wanted),
        "seconds": round(time.monotonic() - started, 1),
    }
    return wanted, facts


@torch.inference_mode()
def follows(model: Any, prompt: list[int], output: list[int]) -> bool:
    """Whether every token is the likeliest one after those before it."""
    logits = model(torch.tensor([prompt + output])).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="prompts are cut from it")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--compressed", action="append", default=[], help="a rankwise folder; repeatable")
    parser.add_argument("--batch", type=int, action="append", help="requests at once; repeatable [1 and 32]")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=64, help="tokens each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.batch = options.batch or [1, 32]
    return options


if __name__ == "__main__":
    main()
