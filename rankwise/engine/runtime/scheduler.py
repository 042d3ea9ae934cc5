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
    def wanted(self) -> int:
        """For so many of its last tokens what follows is asked: 0 within a prompt, more than 1 with a draft."""
        sequence = self.sequence
        return max(0, min(self.count, sequence.computed + self.count - sequence.length + 1))


def require_fit(sequence: Sequence, most_length: int) -> None:
    """Raise a RankwiseError if a prompt is empty, or leaves no room for an output."""
    length = len(sequence.prompt)
    if not 0 < length < most_length:
        raise RankwiseError("prompt", f"{length} tokens", f"allowed: 1 to {most_length - 1}")


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
        require_fit(sequence, self.most_length)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or cancelled, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.let_go(self.pool)

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

    def done(self, share: Share, rejected: int = 0) -> None:
        """Note that a share's keys and values are written, but for those of its last `rejected` tokens."""
        share.sequence.advance(self.pool, share.count - rejected)

    def stretch(self, sequence: Sequence, count: int) -> int:
        """Hold blocks for draft tokens after the next one of a running sequence.

        Free blocks only, so that no other sequence loses its place to a guess; `done` lets go of what was not needed.

        Returns:
            For how many of `count` there is room.
        """
        room = (len(sequence.blocks) + self.pool.available()) * self.pool.size - sequence.length
        count = max(0, min(count, room))
        sequence.hold(self.pool, sequence.left + count)
        return count

    def _admit(self, sequence: Sequence, budget: int) -> Share | None:
        """Start a waiting sequence if blocks for its first chunk are free, beside one for each that runs."""
        sequence.find(self.pool)
        count = min(sequence.left, budget)
        if sequence.missing(self.pool, count) + len(self.running) > self.pool.available():
            sequence.let_go(self.pool)
            return None
        if not sequence.output:
            sequence.cached = sequence.computed
        sequence.hold(self.pool, count)
        return Share(sequence, count)

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Blocks for a running sequence's tokens, at the cost of the youngest others; False if it had to go itself."""
        while sequence.missing(self.pool, count) > self.pool.available():
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.hold(self.pool, count)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.let_go(self.pool)
        sequence.preempted += 1
        self.waiting.appendleft(sequence)
