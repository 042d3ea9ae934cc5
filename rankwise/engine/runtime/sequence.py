"""One request on its way: its tokens, how far they are computed, and where they lie in the cache."""

from dataclasses import dataclass, field
from itertools import count

import torch

from rankwise.engine.runtime.blocks import BlockPool
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
        fresh: so many of the output's last tokens came with the latest step.
        draft: ids that a draft model expects next; the step that verifies them empties it.
        odds: per drafted token the distribution `[vocabulary]` that it was drawn from, where verifying needs it.
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
    fresh: int = 0
    draft: list[int] = field(default_factory=list)
    odds: list[torch.Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.prompt) + len(self.output)

    @property
    def left(self) -> int:
        """Tokens that are still to be computed; one while it decodes."""
        return self.length - self.computed

    def tokens(self, start: int = 0, end: int | None = None) -> list[int]:
        """Prompt and output from `start` to `end`; the draft follows them where `end` lies beyond."""
        end = self.length if end is None else end
        split, length = len(self.prompt), self.length
        found = self.prompt[start : min(end, split)] + self.output[max(0, start - split) : max(0, end - split)]
        return found if end <= length else found + self.draft[max(0, start - length) : end - length]

    def missing(self, pool: BlockPool, count: int) -> int:
        """Blocks that it lacks for `count` more tokens."""
        return -(-(self.computed + count) // pool.size) - len(self.blocks)

    def hold(self, pool: BlockPool, count: int) -> None:
        """Take the blocks for `count` more tokens."""
        self.blocks += [pool.take() for _ in range(self.missing(pool, count))]

    def find(self, pool: BlockPool) -> None:
        """Start from the longest prefix that the pool knows."""
        self.blocks = pool.match(self.tokens())
        self.known = len(self.blocks)
        self.computed = self.known * pool.size

    def advance(self, pool: BlockPool, count: int) -> None:
        """Note that `count` more tokens are written for good; full blocks become known, blocks past them are let go."""
        self.computed += count
        if self.computed // pool.size > self.known:
            self.known = pool.learn(self.blocks, self.tokens(0, self.computed), self.known)
        needed = -(-self.computed // pool.size)
        if needed < len(self.blocks):
            pool.release(self.blocks[needed:])
            del self.blocks[needed:]

    def let_go(self, pool: BlockPool) -> None:
        """Give all its blocks back."""
        pool.release(self.blocks)
        self.blocks, self.computed, self.known = [], 0, 0
