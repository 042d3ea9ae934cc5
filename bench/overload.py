"""Four times as many clients as places: do the requests that are accepted keep their speed?

    python -m bench.overload --max-sequences 8 --max-queue 4 --rounds 3

Starts `rankwise serve` on a free port of this machine, with a short queue. Clients stream one completion after the
other: as many clients as sequences run at once, and four times as many, in turn. Who is refused waits as long as the
answer says and goes on with the next request. Ends with one JSON line, which is added to `--out` if given: of both
loads how requests ended, seconds to the first token (from when the request that was accepted was sent; the wait in the
queue is in it) and seconds for each further one; and of each round how much longer a token took under the larger load.
Exit code 1 if a request ends in another way than completed or refused, if more sequences run than may, or if the time
of a token, median or p95, is more than `--factor` times as long under the larger load.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from openai import APIError, AsyncOpenAI, RateLimitError

from bench.gpu import lines
from bench.soak import ended, numbers, serve, write
from rankwise.provenance import versions
from rankwise.zoo import EMBEDDED

LOADS = {"1x": 1, "4x": 4}  # clients for each sequence that may run
ENDS = ("completed", "refused")
LEAST_WAIT = 0.2  # seconds, whatever a refusal says
SAMPLED = 0.05  # seconds between looks at how many sequences run
BLOCK = 16  # tokens; each sequence needs whole blocks of the cache


@dataclass(frozen=True)
class Work:
    """What clients ask for.

    Args:
        prompt: tokens, drawn at random.
        tokens: of each answer, two at least.
        requests: that are to complete in a phase.
        seed: of the prompts and answers.
    """

    prompt: int
    tokens: int
    requests: int
    seed: int = 0


@dataclass
class Seen:
    """What clients saw in a phase, or in several.

    Args:
        ended: how requests ended: `completed`, `refused`, or in a way that they should not.
        first: seconds to the first token, of those that completed.
        each: seconds for each further token, of the same; a first token that shows no text yet counts as the next.
        running: sequences at once, at most, by the server's metrics.
        seconds: that it took.
    """

    ended: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    running: int = 0
    seconds: float = 0.0

    def add(self, other: "Seen") -> None:
        """Take in another phase."""
        self.ended += other.ended
        self.first += other.first
        self.each += other.each
        self.running, self.seconds = max(self.running, other.running), self.seconds + other.seconds


async def ask(client: AsyncOpenAI, model: str, work: Work, number: int, seen: Seen) -> None:
    """Stream one completion and note its times."""
    dice = random.Random(work.seed * 1_000_003 + number)
    body: dict[str, Any] = {"prompt": [dice.randrange(3, 400) for _ in range(work.prompt)], "seed": number}
    body |= {"max_tokens": work.tokens, "stream_options": {"include_usage": True}, "extra_body": {"ignore_eos": True}}
    times, made, started = list[float](), 0, time.perf_counter()
    async with await client.completions.create(model=model, stream=True, **body) as stream:
        async for event in stream:
            if event.choices:
                times.append(time.perf_counter())
            made = event.usage.completion_tokens if event.usage else made
    if made != work.tokens:
        seen.ended["wrong length"] += 1
        return
    seen.ended["completed"] += 1
    seen.first.append(times[0] - started)
    seen.each.append((times[-1] - times[0]) / (made - 1))


async def press(url: str, model: str, clients: int, work: Work, begin: int = 0) -> Seen:
    """One phase: so many clients, until enough requests have completed.

    Args:
        url: of the server, without `/v1`.
        model: its name.
        clients: that ask again as soon as they are answered.
        work: what they ask for.
        begin: number of the first request; prompts of other numbers are others.
    """
    seen, over, number = Seen(), asyncio.Event(), iter(range(begin, sys.maxsize))

    async def worker(client: AsyncOpenAI) -> None:
        while not over.is_set():
            wait = 0.0
            try:
                await ask(client, model, work, next(number), seen)
            except RateLimitError as error:
                told = error.response.headers.get("retry-after", "")
                seen.ended["refused" if told.isdigit() and int(told) > 0 else "refused without a time"] += 1
                wait = max(LEAST_WAIT, float(told) if told.isdigit() else 0.0)
            except (APIError, httpx.HTTPError) as error:
                seen.ended[f"{type(error).__name__}: {error}"[:200]] += 1
                wait = LEAST_WAIT
            if seen.ended.total() - seen.ended["refused"] >= work.requests:
                over.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), wait)

    async def watch() -> None:
        while not over.is_set():
            seen.running = max(seen.running, int((await asyncio.to_thread(numbers, url))["running"]))
            await asyncio.sleep(SAMPLED)

    started = time.perf_counter()
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=600) as client:
        await asyncio.gather(watch(), *(worker(client) for _ in range(clients)))
    seen.seconds = time.perf_counter() - started
    return seen


def compare(url: str, model: str, places: int, work: Work, rounds: int) -> tuple[dict[str, Seen], list[float]]:
    """Both loads in turn, after a phase that warms up; and in each round, how much longer a token took under more."""
    asyncio.run(press(url, model, places, work))
    whole, ratios, begin = {name: Seen() for name in LOADS}, [], 1_000_000
    for _ in range(rounds):
        found = {}
        for name, times in LOADS.items():
            found[name] = asyncio.run(press(url, model, times * places, work, begin))
            whole[name].add(found[name])
            begin += 1_000_000
        low, high = (statistics.median(seen.each or [float("nan")]) for seen in found.values())
        ratios.append(round(high / low, 3))
    return whole, ratios


def figures(seen: Seen, tokens: int) -> dict[str, Any]:
    """Of one load, for a row."""
    spread = {"first_token_s": seen.first, "time_per_token_s": seen.each}
    rate = seen.ended["completed"] * tokens / seen.seconds
    shown = {"ended": dict(seen.ended), "most_running": seen.running, "tokens_per_s": round(rate, 1)}
    return shown | {name: quantiles(values) for name, values in spread.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and p95; of fewer than two values there are none."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": round(cuts[9], 5), "p95": round(cuts[18], 5)}


def complaints(loads: dict[str, dict[str, Any]], places: int, factor: float) -> list[str]:
    """What should not have been."""
    found = [f"{name}: {end}" for name, one in loads.items() for end in one["ended"] if end not in ENDS]
    found += [f"{name}: {one['most_running']} ran" for name, one in loads.items() if one["most_running"] > places]
    low, high = (one["time_per_token_s"] for one in loads.values())
    if not low or not high:
        return [*found, "too few requests completed"]
    worse = {name: high[name] / low[name] for name in low}
    return found + [f"time per token, {name}: {value:.2f} times" for name, value in worse.items() if value > factor]


def command(options: argparse.Namespace) -> list[str]:
    """The server's: a cache that holds what runs, so that no sequence loses its place."""
    length = -(-(options.prompt + options.tokens) // BLOCK) * BLOCK + BLOCK
    sizes = {"max-sequences": options.max_sequences, "max-queue": options.max_queue, "max-model-len": length}
    sizes["kv-tokens"] = (options.max_sequences + 2) * length
    limits = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    return serve(*limits, "--dtype", options.dtype, "--device", options.device, "--name", "pressed", options.model)


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What was run, and on what."""
    gpu = options.device != "cpu" and torch.cuda.is_available()
    names = ("model", "dtype", "max_sequences", "max_queue", "rounds", "requests", "prompt", "tokens", "factor")
    device = torch.cuda.get_device_name() if gpu else "cpu"
    found = versions() | (lines.versions() if gpu else {})
    about = {"bench": "overload", "device": device, "versions": found, "threads": torch.get_num_threads()}
    return about | {name: getattr(options, name) for name in names}


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-sequences", type=int, default=8)
    parser.add_argument("--max-queue", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of both loads")
    parser.add_argument("--requests", type=int, default=64, help="that are to complete under each load in a round")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, 2 at least")
    parser.add_argument(
        "--factor", type=float, default=1.5, help="that a token may take longer under four times the load"
    )
    parser.add_argument("--out", type=Path, help="a file of JSON lines")
    options = parser.parse_args()
    if options.tokens < 2:
        parser.error(f"--tokens {options.tokens}: 2 at least")
    return options


def main() -> int:
    """Press, and judge."""
    options = parse()
    work = Work(options.prompt, options.tokens, options.requests)
    with subprocess.Popen(command(options), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            return 1  # the server said why
        try:
            seen, ratios = compare(json.loads(line)["url"], "pressed", options.max_sequences, work, options.rounds)
        finally:
            server.terminate()
        code = ended(server)
    loads = {name: figures(one, options.tokens) for name, one in seen.items()}
    wrong = complaints(loads, options.max_sequences, options.factor) + ([f"exit code {code}"] if code else [])
    write(facts(options) | {"loads": loads, "ratios": ratios, "complaints": wrong}, options.out)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
