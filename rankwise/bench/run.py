"""The run: all contestants one after another, round by round, so that a machine that drifts treats all alike."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.bench.arrivals import cut_prompts, make_prompts, make_trace
from rankwise.bench.config import BenchConfig, Contestant
from rankwise.bench.memory import bandwidth
from rankwise.bench.process import Worker
from rankwise.bench.summary import Round, batch_row, load_row, measured, spread
from rankwise.progress import Track, say, silent
from rankwise.zoo import disk_bytes, resolve_device

LOAD = (0, 0)  # the key of what was measured under load, among shapes
Samples = dict[tuple[int, int], list[list[Round]]]  # per shape and contestant, its rounds


def bench(
    contestants: Sequence[Contestant],
    config: BenchConfig,
    *,
    text: Sequence[int] | None = None,
    track: Track = silent,
) -> dict[str, Any]:
    """Measure contestants against each other.

    Args:
        contestants: from `line_up`; the first is what others are compared with.
        config: what is timed.
        text: token ids that prompts are cut from; None: random ones, which those under load always are.
        track: progress.

    Returns:
        `rows`: one a contestant and shape. Times in ms: `ttft_ms_…` to the first token and `tpot_ms_…` between
        tokens, p50, p95 and p99 over all sequences and rounds; p20, p50 and p80 over rounds of `tokens_per_s`, of
        `mbu_percent` (bytes that a decode step reads against the bandwidth measured in that round) and of `vs_first`
        (the same numbers divided by the first contestant's within a round); bytes of weights on disk and in memory, of
        keys and values, and peak bytes (of the GPU's allocator on CUDA, of the contestant's process on a CPU).
        `load`: the same under load, with `e2e_ms_…`, `goodput_per_s` and `good_share`; empty if not asked for.
        `bandwidth_bytes_per_s`: p20, p50 and p80.

    Raises:
        RankwiseError: a model cannot be loaded, or its logits fail the check that precedes the timing.
    """
    workers = []
    try:
        with track("loading", len(contestants)) as advance:
            facts = []
            for contestant in contestants:
                workers.append(Worker(contestant, config))
                facts.append(workers[-1].ready())
                advance()
        vocabulary = min(fact["vocabulary"] for fact in facts)
        samples, speeds = _measure(workers, config, Prompts(vocabulary, text), track)
    finally:
        for worker in workers:
            worker.stop()
    rows = [_row(*pair, at, samples, config) for at in range(len(workers)) for pair in [(contestants[at], facts[at])]]
    shaped = [row for several, _ in rows for row in several]
    return {
        "rows": sorted(shaped, key=lambda row: config.shapes.index((row["batch"], row["prompt"]))),
        "load": [row for _, row in rows if row],
        "bandwidth_bytes_per_s": spread(speeds),
    }


@dataclass(frozen=True)
class Prompts:
    """Where they come from.

    Args:
        vocabulary: random ids are below it.
        text: as in `bench`.
    """

    vocabulary: int
    text: Sequence[int] | None

    def __call__(self, batch: int, length: int, round_: int) -> list[list[int]]:
        """Of a round, the same for all contestants."""
        if self.text is None:
            return make_prompts(batch, length, self.vocabulary, round_)
        return cut_prompts(self.text, batch, length, round_)


def _measure(workers: list[Worker], config: BenchConfig, prompts: Prompts, track: Track) -> tuple[Samples, list[float]]:
    keys = [*config.shapes, *([LOAD] if config.load else [])]
    samples: Samples = {key: [[] for _ in workers] for key in keys}
    device, speeds = resolve_device(config.device), []
    with track("timing", len(keys) * len(workers) * (config.rounds + 1)) as advance:
        for round_ in range(-1, config.rounds):  # the first one warms up
            speed = bandwidth(device)
            for key in keys:
                ask = _question(key, config, prompts, round_, speed)
                for place in range(len(workers)):
                    at = (place + round_) % len(workers)  # who begins changes too
                    done = ask(workers[at])
                    if round_ >= 0:
                        samples[key][at].append(done)
                    advance()
                    say(advance, str(workers[at].contestant))
            if round_ >= 0:
                speeds.append(speed)
    return samples, speeds


def _question(
    key: tuple[int, int], config: BenchConfig, prompts: Prompts, round_: int, speed: float
) -> Callable[[Worker], Round]:
    if key == LOAD and config.load:
        trace = make_trace(config.load, prompts.vocabulary, round_)
        return lambda worker: measured(worker.ask("serve", trace), speed, trace)
    made = prompts(*key, round_)
    return lambda worker: measured(worker.ask("batch", made, config.new_tokens), speed)


def _row(
    contestant: Contestant, facts: dict[str, Any], at: int, samples: Samples, config: BenchConfig
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The rows of a contestant, and the one under load."""
    who = {"name": contestant.model, "engine": contestant.engine, "rounds": config.rounds}
    where = {key: facts[key] for key in ("device", "dtype", "versions")}
    where["weight_bytes"] = disk_bytes(contestant.model, config.dtype)
    rows = []
    for batch, prompt in config.shapes:
        own = samples[batch, prompt]
        shape = {"batch": batch, "prompt": prompt, "new_tokens": config.new_tokens}
        rows.append(who | shape | batch_row(own[at], own[0], facts["footprint"], prompt) | where)
    if not config.load:
        return rows, None
    own = samples[LOAD]
    return rows, who | asdict(config.load) | load_row(own[at], own[0], config.load) | where
