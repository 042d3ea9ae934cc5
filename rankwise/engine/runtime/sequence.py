"""One request on its way: its tokens, how far they are computed, and where they lie in the cache."""

from dataclasses import dataclass, field
from itertools import count

import torch

from rankwise.engine.runtime.params import Logprob, SamplingParams

_numbers = count()


@dataclass(eq=False)
class Sequence:
    """A request's state.

    Args:
        prompt: ids.
        params: what it asks for.
        generator: of its random numbers.
        number: in order of arrival.
        output: ids generated so far.
        blocks: its blocks in the cache.
        computed: tokens whose keys and values are written.
        known: of its blocks, how many the pool knows by their tokens.
        cached: tokens of the prompt that were there already when it started.
        logprobs: per output token, if asked for.
        finish_reason: empty while it runs.
        preempted: how often it lost its place.
    """

    prompt: list[int]
    params: SamplingParams
    generator: torch.Generator = field(default_factory=torch.Generator)
    number: int = field(default_factory=lambda: next(_numbers))
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    known: int = 0
    cached: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str = ""
    preempted: int = 0

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.prompt) + len(self.output)

    @property
    def left(self) -> int:
        """Tokens that are still to be computed; one while it decodes."""
        return self.length - self.computed

    def tokens(self, start: int = 0, end: int | None = None) -> list[int]:
        """Prompt and output from `start` to `end`."""
        end = self.length if end is None else end
        split = len(self.prompt)
        return self.prompt[start : min(end, split)] + self.output[max(0, start - split) : max(0, end - split)]
