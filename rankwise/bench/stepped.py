"""Timing an engine that takes requests at any time and gives tokens step by step."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Sequence

from rankwise.bench.arrivals import Request

Stamps = list[list[float]]  # per request, seconds from the start to each of its tokens


class Stepped(ABC):
    """What such an engine offers; outputs are greedy and do not end early."""

    @abstractmethod
    def add(self, prompt: list[int], new_tokens: int) -> Hashable:
        """Take a request; returns what `step` will call it."""

    @abstractmethod
    def step(self) -> list[tuple[Hashable, int]]:
        """One step: who got tokens, and how many it has now."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a request waits or runs."""

    def batch(self, prompts: Sequence[list[int]], new_tokens: int) -> Stamps:
        """Complete prompts that come all at once."""
        return self.serve([Request(0.0, prompt, new_tokens) for prompt in prompts])

    def serve(self, trace: Sequence[Request]) -> Stamps:
        """Complete requests that come when they come. Seconds are those of the trace; arrivals are not taken off."""
        waiting, stamps = deque(trace), {}
        start = time.perf_counter()
        while waiting or self.busy:
            while waiting and waiting[0].arrival <= time.perf_counter() - start:
                request = waiting.popleft()
                stamps[self.add(request.prompt, request.output)] = list[float]()
            if not self.busy:
                time.sleep(max(0.0, waiting[0].arrival - (time.perf_counter() - start)))
                continue
            grown = self.step()
            now = time.perf_counter() - start
            for key, count in grown:
                stamps[key] += [now] * (count - len(stamps[key]))
        return list(stamps.values())
