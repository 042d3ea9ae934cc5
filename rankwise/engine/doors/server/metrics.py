"""Numbers for Prometheus, of one server."""

from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rankwise.engine.runtime.speculative import Tally

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
BETWEEN = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)


@dataclass(frozen=True)
class State:
    """The engine as it was after its last step; made by its thread, read by any.

    Args:
        waiting: sequences that hold no place.
        running: that do.
        used: blocks of the KV cache that a sequence holds.
        blocks: of the KV cache.
        seconds: a sequence took lately, from its acceptance to its end.
    """

    waiting: int = 0
    running: int = 0
    used: int = 0
    blocks: int = 1
    seconds: float = 0.0


class Metrics:
    """Counters, gauges and histograms in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.state = State()
        where = self.registry
        labels = ["endpoint", "outcome"]
        self.requests = Counter("rankwise_requests", "Requests by how they ended", labels, registry=where)
        self.prompt_tokens = Counter("rankwise_prompt_tokens", "Tokens of accepted prompts", registry=where)
        self.generated_tokens = Counter("rankwise_generated_tokens", "Tokens generated", registry=where)
        self.drafted = Counter("rankwise_draft_tokens", "Drafted tokens that were verified", registry=where)
        self.accepted = Counter("rankwise_accepted_draft_tokens", "Drafted tokens that stayed", registry=where)
        self._noted = Tally()
        self.first = Histogram("rankwise_time_to_first_token_seconds", "From acceptance", buckets=FIRST, registry=where)
        self.between = Histogram(
            "rankwise_inter_token_seconds", "Between tokens of a sequence", buckets=BETWEEN, registry=where
        )
        gauges = {
            "queue_length": ("Sequences that wait", lambda: self.state.waiting),
            "running": ("Sequences that run", lambda: self.state.running),
            "kv_blocks_used": ("Blocks of the KV cache in use", lambda: self.state.used),
            "kv_blocks": ("Blocks of the KV cache", lambda: self.state.blocks),
            "kv_use": ("Share of the KV cache in use", lambda: self.state.used / self.state.blocks),
        }
        for name, (what, value) in gauges.items():
            Gauge(f"rankwise_{name}", what, registry=where).set_function(value)

    def note(self, tally: Tally | None) -> None:
        """Bring the counters of drafting up to date. For the engine's thread."""
        if tally is not None:
            self.drafted.inc(tally.drafted - self._noted.drafted)
            self.accepted.inc(tally.accepted - self._noted.accepted)
            self._noted = replace(tally)

    def text(self) -> bytes:
        """What `/metrics` answers."""
        return generate_latest(self.registry)
