"""Many requests of mixed size at one server, a third of which are given up on the way: does anything leak?

    python bench/soak.py --model embedded:smollm2-135m --requests 10000 --out bench/results/cpu/soak.jsonl

Starts `rankwise serve` on a free port of this machine, sends completions and chats, whole and streamed, greedy and
sampled, with one or two choices, and ends with one JSON line: how requests ended as the clients and as the server saw
it, memory of the server over time, and what was still held at the end. Exit code 1 if a block of the KV cache or a
sequence is left, if a request ends in another way than it should or fails in the server, or if memory grew by more than
`--growth` MiB after the first tenth of the requests. `--out` appends the line to a file, with versions.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import APIStatusError, AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from bench.sheet import append
from rankwise.progress import Track, on_terminal, silent
from rankwise.provenance import versions

WORDS = "the model keeps its ranks and the cache holds blocks of keys for every prompt that begins alike"
QUEUE = 64
LIMITS = ["--max-queue", str(QUEUE), "--kv-tokens", "8192", "--max-model-len", "1024"]


@dataclass(frozen=True)
class Mix:
    """What is sent.

    Args:
        requests: in all.
        together: at once.
        words: of a prompt, at most.
        tokens: of an output, at most.
        seed: fixes what is drawn; when answers come is not fixed.
    """

    requests: int
    together: int = 32
    words: int = 200
    tokens: int = 48
    seed: int = 0


def draw(mix: Mix, number: int) -> tuple[bool, dict[str, Any], float | None]:
    """One request: whether it is a chat, its body, and how far it gets before it is given up (None: to its end)."""
    dice = random.Random(mix.seed * 1_000_003 + number)
    text = " ".join(dice.choices(WORDS.split(), k=dice.randint(1, mix.words)))
    body: dict[str, Any] = {"max_tokens": dice.randint(1, mix.tokens), "stream": dice.random() < 0.6}
    body |= {"temperature": dice.choice([0, 0.7, 1.3]), "n": dice.choice([1, 1, 1, 2]), "seed": number}
    body["extra_body"] = {"ignore_eos": True, "top_k": dice.choice([0, 20])}
    chat = dice.random() < 0.5
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    return chat, body, dice.random() if number % 3 == 0 else None


async def ask(client: AsyncOpenAI, model: str, chat: bool, body: dict[str, Any], until: float | None) -> str:
    """Send a request; how it ended, as the client sees it."""
    create: Any = client.chat.completions.create if chat else client.completions.create
    wanted = body["max_tokens"] * body["n"]
    if not body["stream"]:
        answer = await asyncio.wait_for(create(model=model, **body), None if until is None else 0.3 * until)
        return "completed" if answer.usage.completion_tokens == wanted else "wrong length"
    stream = await create(model=model, stream_options={"include_usage": True}, **body)
    seen, usage = 0, None
    async with stream:
        async for event in stream:
            seen += 1
            usage = event.usage or usage
            if until is not None and seen > until * wanted:
                return "given up"
    return "completed" if usage and usage.completion_tokens == wanted else "wrong length"


async def traffic(url: str, model: str, mix: Mix, sampled: Callable[[int], None] = lambda done: None) -> Counter[str]:
    """Send a mix; how its requests ended, as the clients see it.

    Args:
        url: of the server, without `/v1`.
        model: its name.
        mix: what to send.
        sampled: called after every request with how many are done.
    """
    ended: Counter[str] = Counter()
    numbers = iter(range(mix.requests))

    async def worker(client: AsyncOpenAI) -> None:
        for number in numbers:
            try:
                ended[await ask(client, model, *draw(mix, number))] += 1
            except TimeoutError:
                ended["given up"] += 1
            except APIStatusError as error:
                ended[f"status {error.status_code}"] += 1
                await asyncio.sleep(0.2)
            sampled(ended.total())

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=300) as client:
        await asyncio.gather(*(worker(client) for _ in range(mix.together)))
    return ended


def numbers(url: str) -> dict[str, float]:
    """`/metrics` of a server, by name and labels."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text)
    return {
        ",".join([sample.name.removeprefix("rankwise_"), *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def settled(url: str, seconds: float = 30) -> dict[str, float]:
    """The metrics when nothing is held any more, or after so long."""
    end = time.monotonic() + seconds
    while True:
        found = numbers(url)
        held = sum(found[name] for name in ("queue_length", "running", "kv_blocks_used"))
        if not held or time.monotonic() > end:
            return found
        time.sleep(0.1)


def fill(url: str, model: str, tokens: int, length: int = 512) -> None:
    """Use every block of the cache once: the system gives out its memory when it is first written."""
    dice = random.Random(0)
    for _ in range(-(-tokens // length) + 1):
        body = {"model": model, "prompt": [dice.randrange(3, 400) for _ in range(length)], "max_tokens": 1}
        httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status()


def soak(url: str, model: str, process: psutil.Process, mix: Mix, track: Track = silent) -> dict[str, Any]:
    """Send a mix and say what came of it; memory in MiB, of the server, at every tenth of the requests."""
    memory: list[float] = []
    started = time.monotonic()
    with track("requests", mix.requests) as advance:

        def sampled(done: int) -> None:
            if done * 10 // mix.requests > len(memory):
                memory.append(round(process.memory_info().rss / 2**20, 1))
            advance()

        ended = asyncio.run(traffic(url, model, mix, sampled))
    seconds, found = time.monotonic() - started, settled(url)
    outcomes = {name.removeprefix("requests_total,"): v for name, v in found.items() if name.startswith("requests_t")}
    left = {name: found[name] for name in ("queue_length", "running", "kv_blocks_used")}
    rate = {"seconds": round(seconds, 1), "tokens_per_s": round(found["generated_tokens_total"] / seconds, 1)}
    return {"clients": dict(ended), "server": outcomes, "left": left, "memory": memory, **rate}


def serve(*arguments: str) -> list[str]:
    """The command of a server on a free port, which says where it listens in a line of JSON."""
    return [str(Path(sys.executable).with_name("rankwise")), "serve", "--port", "0", "--json", *arguments]


def write(row: dict[str, Any], out: Path | None) -> None:
    """Print a row, and append it to a file if there is to be one."""
    print(json.dumps(row))  # noqa: T201
    if out is not None:
        append(out, row)


def ended(server: subprocess.Popen[str]) -> int:
    """The exit code of a server that was asked to end; it is killed if it does not."""
    try:
        return server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def main() -> int:
    """Soak, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--together", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--growth", type=float, default=64, help="MiB that memory may grow by.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the result to this file")
    options = parser.parse_args()
    with subprocess.Popen(
        serve(*LIMITS, "--name", "soaked", options.model), stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            return 1  # the server said why
        where = json.loads(line)
        fill(where["url"], "soaked", where["kv_tokens"])
        mix = Mix(options.requests, options.together, tokens=options.tokens, seed=options.seed)
        result = soak(where["url"], "soaked", psutil.Process(server.pid), mix, on_terminal)
        server.terminate()
        result |= {"exit_code": ended(server), "requests": mix.requests, "together": mix.together}
    growth = max(result["memory"]) - result["memory"][0]
    facts = {"bench": "soak", "versions": versions(), "model": options.model, "queue": QUEUE}
    write(facts | result | {"growth": round(growth, 1)}, options.out)
    expected = set(result["clients"]) <= {"completed", "given up", "status 429"}
    broken = any(outcome.endswith(",failed") for outcome in result["server"])  # also where nobody was left to see it
    clean = expected and not broken and not any(result["left"].values()) and result["exit_code"] == 0
    return 0 if clean and growth <= options.growth else 1


if __name__ == "__main__":
    sys.exit(main())
