"""Continuous batching: which sequences run in the next step, and how many of their tokens.

Running sequences come first, in order of arrival; what is left of the step's budget goes to prompts, cut into chunks
where they do not fit. A sequence that needs a block when none is free takes the place of the youngest one, which is
computed again later.
"""

from collections import deque
from dataclasses import dataclass

from rankwise.engine.runtime.blocks import BlockPool
from rankwise.engine.runtime.sequence import Sequence
from rankwise.errors import RankwiseError


@dataclass(frozen=True)
class Share:
    """A sequence's part of a step.

    Args:
        sequence: whose.
        count: of its tokens, from the first that is not computed.
    """

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step ends with its next token."""
        return self.count == self.sequence.left


class Scheduler:
    """Waiting and running sequences.

    Args:
        pool: the cache's blocks.
        most_sequences: that run at once.
        most_tokens: of one step.
        most_length: of a sequence, its output included.
    """

    def __init__(self, pool: BlockPool, *, most_sequences: int, most_tokens: int, most_length: int) -> None:
        self.pool, self.most_sequences, self.most_tokens = pool, most_sequences, most_tokens
        self.most_length = min(most_length, pool.count * pool.size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Let a request wait for its turn.

        Raises:
            RankwiseError: its prompt is empty, or leaves no room for an output.
        """
        length = len(sequence.prompt)
        if not 0 < length < self.most_length:
            raise RankwiseError("prompt", f"{length} tokens", f"allowed: 1 to {self.most_length - 1}")
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or cancelled, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def next(self) -> list[Share]:
        """The shares of the next step; those with one token first. Empty when nothing is to be done."""
        budget, shares = self.most_tokens, []
        for sequence in list(self.running):
            if sequence in self.running and budget > 0:  # another one may have taken its place
                count = min(sequence.left, budget)
                if self._reserve(sequence, count):
                    shares.append(Share(sequence, count))
                    budget -= count
        shares = [share for share in shares if share.sequence in self.running]
        while self.waiting and budget > 0 and len(self.running) < self.most_sequences:
            share = self._admit(self.waiting[0], budget)
            if share is None:
                break
            self.running.append(self.waiting.popleft())
            shares.append(share)
            budget -= share.count
        return sorted(shares, key=lambda share: share.count > 1)

    def done(self, share: Share) -> None:
        """Note that a share's keys and values are written."""
        sequence = share.sequence
        sequence.computed += share.count
        if sequence.computed // self.pool.size > sequence.known:
            written = sequence.tokens(0, sequence.computed)
            sequence.known = self.pool.learn(sequence.blocks, written, sequence.known)

    def _admit(self, sequence: Sequence, budget: int) -> Share | None:
        """Start a waiting sequence if blocks for its first chunk are free, beside one for each that runs."""
        sequence.blocks = self.pool.match(sequence.tokens())
        sequence.computed = len(sequence.blocks) * self.pool.size
        sequence.known = len(sequence.blocks)
        count = min(sequence.left, budget)
        if self._missing(sequence, count) + len(self.running) > self.pool.available():
            self._release(sequence)
            return None
        if not sequence.output:
            sequence.cached = sequence.computed
        self._extend(sequence, count)
        return Share(sequence, count)

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Blocks for a running sequence's tokens, at the cost of the youngest others; False if it had to go itself."""
        while self._missing(sequence, count) > self.pool.available():
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self._extend(sequence, count)
        return True

    def _missing(self, sequence: Sequence, count: int) -> int:
        return -(-(sequence.computed + count) // self.pool.size) - len(sequence.blocks)

    def _extend(self, sequence: Sequence, count: int) -> None:
        sequence.blocks += [self.pool.take() for _ in range(self._missing(sequence, count))]

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preempted += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.known = [], 0, 0
