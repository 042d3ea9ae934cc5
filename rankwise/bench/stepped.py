"""Timing an engine that takes requests at any time and gives tokens step by step."""

import time
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Protocol

from rankwise.bench.arrivals import Request

Stamps = list[list[float]]  # per request, seconds from the start to each of its tokens


class Stepped(Protocol):
    """What such an engine offers; outputs are greedy and do not end early."""

    def add(self, prompt: list[int], new_tokens: int) -> Hashable:
        """Take a request; returns what `step` will call it."""

    def step(self) -> list[tuple[Hashable, int]]:
        """One step: who got tokens, and how many it has now."""

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""


def run_batch(engine: Stepped, prompts: Sequence[list[int]], new_tokens: int) -> Stamps:
    """Complete prompts that come all at once."""
    return run_trace(engine, [Request(0.0, prompt, new_tokens) for prompt in prompts])


def run_trace(engine: Stepped, trace: Sequence[Request]) -> Stamps:
    """Complete requests that come when they come. Seconds are those of the trace; arrivals are not taken off."""
    waiting, stamps = deque(trace), {}
    start = time.perf_counter()
    while waiting or engine.busy:
        while waiting and waiting[0].arrival <= time.perf_counter() - start:
            request = waiting.popleft()
            stamps[engine.add(request.prompt, request.output)] = list[float]()
        if not engine.busy:
            time.sleep(max(0.0, waiting[0].arrival - (time.perf_counter() - start)))
            continue
        grown = engine.step()
        now = time.perf_counter() - start
        for key, count in grown:
            stamps[key] += [now] * (count - len(stamps[key]))
    return list(stamps.values())
