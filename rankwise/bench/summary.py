"""From token times to the numbers of a row."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rankwise.bench.arrivals import Request
from rankwise.bench.config import Load
from rankwise.bench.memory import Footprint
from rankwise.bench.stepped import Stamps

SHARES = (50, 95, 99)
SPREAD = (20, 50, 80)  # of what has one value a round


@dataclass(frozen=True)
class Round:
    """What one contestant did in one round.

    Args:
        stamps: per request, seconds from its arrival to each of its tokens.
        seconds: from the start to the last token.
        peak: bytes of memory.
        bandwidth: bytes a second that memory gave in this round.
        requests: of a round under load, else empty.
    """

    stamps: Stamps
    seconds: float
    peak: int
    bandwidth: float
    requests: Sequence[Request] = ()

    @property
    def firsts(self) -> list[float]:
        """Seconds to the first token."""
        return [times[0] for times in self.stamps]

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens of a request, of all requests."""
        return [b - a for times in self.stamps for a, b in pairwise(times)]

    @property
    def ends(self) -> list[float]:
        """Seconds to the last token."""
        return [times[-1] for times in self.stamps]

    @property
    def rate(self) -> float:
        """Output tokens a second, prompts included in the time."""
        return sum(map(len, self.stamps)) / self.seconds


def measured(answer: dict[str, Any], bandwidth: float, trace: Sequence[Request] = ()) -> Round:
    """A worker's answer as a round; arrivals are taken off the times."""
    stamps: Stamps = answer["stamps"]
    last = max(times[-1] for times in stamps)
    if trace:
        stamps = [[t - r.arrival for t in times] for times, r in zip(stamps, trace, strict=True)]
    return Round(stamps, last, answer["peak"], bandwidth, trace)


def batch_row(rounds: Sequence[Round], first: Sequence[Round], print_: Footprint, prompt: int) -> dict[str, Any]:
    """Numbers of one shape.

    Args:
        rounds: of a contestant.
        first: of the first contestant, in the same rounds.
        print_: bytes that it holds and reads.
        prompt: tokens of the prompts.
    """
    batch, new = len(rounds[0].stamps), len(rounds[0].stamps[0])
    read = print_.step + batch * print_.kv_bytes(prompt + new // 2)
    use = [100 * read / statistics.median(r.gaps) / r.bandwidth for r in rounds]
    return {
        **_latencies(rounds),
        "tokens_per_s": spread([r.rate for r in rounds]),
        "tokens_per_s_by_round": [r.rate for r in rounds],
        "decode_tokens_per_s": batch / statistics.median([gap for r in rounds for gap in r.gaps]),
        "step_bytes": read,
        "mbu_percent": spread(use),
        "kv_bytes": batch * print_.kv_bytes(prompt + new),
        "weight_memory_bytes": print_.weights,
        "peak_bytes": max(r.peak for r in rounds),
        "vs_first": _against(rounds, first),
    }


def load_row(rounds: Sequence[Round], first: Sequence[Round], load: Load) -> dict[str, Any]:
    """Numbers under load; arguments as in `batch_row`."""
    good = [[is_good(times, load) for times in r.stamps] for r in rounds]
    return {
        **_latencies(rounds),
        **percentiles("e2e_ms", [1000 * end for r in rounds for end in r.ends]),
        "tokens_per_s": spread([r.rate for r in rounds]),
        "requests_per_s": spread([len(r.stamps) / r.seconds for r in rounds]),
        "goodput_per_s": spread([sum(g) / r.seconds for g, r in zip(good, rounds, strict=True)]),
        "good_share": sum(map(sum, good)) / sum(map(len, good)),
        "peak_bytes": max(r.peak for r in rounds),
        "vs_first": {**_against(rounds, first), "e2e": _ratio(rounds, first, lambda r: statistics.median(r.ends))},
    }


def is_good(times: Sequence[float], load: Load) -> bool:
    """Whether a request met both limits; the time of a further token is its mean."""
    return times[0] <= load.ttft_limit and (times[-1] - times[0]) / (len(times) - 1) <= load.tpot_limit


def _latencies(rounds: Sequence[Round]) -> dict[str, float]:
    firsts = [1000 * value for r in rounds for value in r.firsts]
    gaps = [1000 * value for r in rounds for value in r.gaps]
    return {**percentiles("ttft_ms", firsts), **percentiles("tpot_ms", gaps)}


def _against(rounds: Sequence[Round], first: Sequence[Round]) -> dict[str, list[float]]:
    """Ratios within a round to the first contestant: of median times, and of tokens a second."""
    return {
        "ttft": _ratio(rounds, first, lambda r: statistics.median(r.firsts)),
        "tpot": _ratio(rounds, first, lambda r: statistics.median(r.gaps)),
        "tokens_per_s": _ratio(rounds, first, lambda r: r.rate),
    }


def _ratio(rounds: Sequence[Round], first: Sequence[Round], of: Callable[[Round], float]) -> list[float]:
    return spread([of(ours) / of(theirs) for ours, theirs in zip(rounds, first, strict=True)])


def spread(values: Sequence[float]) -> list[float]:
    """p20, p50 and p80."""
    return [percentile(values, share) for share in SPREAD]


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99, as `NAME_p50` and so on."""
    return {f"{name}_p{share}": percentile(values, share) for share in SHARES}


def percentile(values: Sequence[float], share: int) -> float:
    """The given percentile, linearly interpolated; of one value, that value."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]
