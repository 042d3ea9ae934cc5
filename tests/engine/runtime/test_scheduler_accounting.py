"""Requests that come, share, draft, lose their place and are cancelled, in any order: every block is accounted for."""

from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from rankwise.engine.runtime.blocks import BlockPool
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.scheduler import Scheduler, Share
from rankwise.engine.runtime.sequence import Sequence
from rankwise.errors import RankwiseError

TOKENS = st.integers(0, 1)  # so few that outputs are alike, too
BEGINNING = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0]
PROMPTS = st.builds(
    lambda common, more: BEGINNING[:common] + more,
    st.sampled_from([4, 6, 8, 9, 12]),
    st.lists(TOKENS, min_size=1, max_size=11),
)
NEW = st.sampled_from([12, 7, 3, 1])
GUESSES = st.sampled_from([3, 2, 1, 0])


class Accounts(RuleBasedStateMachine):
    """A scheduler, and a cache that notes in each place the tokens up to the one whose keys and values lie there."""

    met: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Sequence] = []
        self.cache: dict[int, tuple[int, ...]] = {}

    @initialize(
        room=st.sampled_from([24, 16, 32, 12]),
        size=st.sampled_from([2, 3, 1, 4]),
        sequences=st.sampled_from([4, 6, 2, 1]),
        tokens=st.sampled_from([20, 9, 4, 1]),
        length=st.sampled_from([24, 20, 12]),
        first=st.lists(st.tuples(PROMPTS, NEW), min_size=2, max_size=6),
    )
    def begin(self, room: int, size: int, sequences: int, tokens: int, length: int, first: Any) -> None:
        self.pool = BlockPool(room // size, size)
        self.scheduler = Scheduler(self.pool, most_sequences=sequences, most_tokens=tokens, most_length=length)
        for prompt, new in first:
            self.add(prompt, new)

    @rule(prompt=PROMPTS, new=NEW)
    def add(self, prompt: list[int], new: int) -> None:
        sequence = Sequence(prompt[: self.scheduler.most_length - 1], SamplingParams(max_tokens=new))
        self.scheduler.add(sequence)
        self.live.append(sequence)

    @rule(times=st.sampled_from([3, 2, 1]), data=st.data())
    def steps(self, times: int, data: Any) -> None:
        for _ in range(times):
            self.step(data)
            self.those_that_run_find_their_own_tokens()

    def step(self, data: Any) -> None:
        shares = self.shares()
        budget = self.scheduler.most_tokens - sum(share.count for share in shares)
        longer = []
        for share in shares:
            count = self.draft(share, budget, data) if share.count == share.wanted else 0
            longer.append(Share(share.sequence, share.count + count))
            budget -= count
        self.every_block_is_where_it_should_be()
        for share in longer:
            self.write(share)
        for share in longer:
            self.verify(share, data.draw(st.integers(0, len(share.sequence.draft))), data.draw(TOKENS))

    @rule(number=st.integers(0, 19))
    def cancel(self, number: int) -> None:
        if number < len(self.live):
            sequence = self.live[number]
            self.met["cancelled while it ran" if sequence.blocks else "cancelled while it waited"] += 1
            self.end(sequence)

    def teardown(self) -> None:
        """Everyone ends, and then nothing is held."""
        for _ in range(2000):
            for share in self.shares():
                self.write(share)
                self.verify(share, 0, 1)
            if not self.live:
                break
        assert not self.live
        assert self.pool.available() == self.pool.count
        assert self.shares() == []

    def shares(self) -> list[Share]:
        """The next step's; someone always has one."""
        before = {sequence: sequence.preempted for sequence in self.live}
        shares = self.scheduler.next()
        self.met["lost their place"] += sum(sequence.preempted - before[sequence] for sequence in self.live)
        self.met["shared"] += sum(holders > 1 for holders in self.pool.holders)
        assert bool(shares) == bool(self.live)
        assert sum(share.count for share in shares) <= self.scheduler.most_tokens
        assert {share.sequence for share in shares} <= set(self.scheduler.running)
        return shares

    def draft(self, share: Share, budget: int, data: Any) -> int:
        """Guess what follows, no more than a request may still get, nor than the step has room for."""
        sequence = share.sequence
        left = sequence.params.max_tokens - len(sequence.output)
        most = min(left - 1, self.scheduler.most_length - sequence.length - 1, budget)
        if most < 1:
            return 0
        count = self.scheduler.stretch(sequence, min(most, data.draw(GUESSES)))
        sequence.draft += data.draw(st.lists(TOKENS, min_size=count, max_size=count))
        return count

    def write(self, share: Share) -> None:
        """What a step computes, from all that lies before."""
        sequence = share.sequence
        tokens = tuple(sequence.tokens(0, sequence.computed + share.count))
        assert len(sequence.blocks) * self.pool.size >= len(tokens)
        self.require_cached(sequence)
        for place in range(sequence.computed, len(tokens)):
            self.cache[self.slot(sequence, place)] = tokens[: place + 1]

    def verify(self, share: Share, accepted: int, token: int) -> None:
        """Some of the draft stays, and one token follows."""
        sequence = share.sequence
        if not share.wanted:
            self.scheduler.done(share)
            return
        self.met["accepted"] += accepted
        self.met["rejected"] += len(sequence.draft) - accepted
        chosen = [*sequence.draft[:accepted], token]
        self.scheduler.done(share, share.wanted - len(chosen))
        sequence.draft.clear()
        sequence.output += chosen
        if len(sequence.output) == sequence.params.max_tokens or sequence.length == self.scheduler.most_length:
            self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        """Once more does no harm."""
        self.live.remove(sequence)
        for _ in range(2):
            self.scheduler.remove(sequence)
            assert not sequence.blocks

    @invariant()
    def every_block_is_where_it_should_be(self) -> None:
        held = Counter(block for sequence in self.live for block in sequence.blocks)
        assert self.pool.holders == [held[block] for block in range(self.pool.count)]
        assert set(self.pool.free) == set(range(self.pool.count)) - set(held)
        assert self.pool.known == {digest: block for block, digest in enumerate(self.pool.hashes) if digest}
        assert all(len(set(sequence.blocks)) == len(sequence.blocks) for sequence in self.live)
        for block in list(self.pool.free):
            with pytest.raises(RankwiseError, match="released twice"):
                self.pool.release([block])

    @invariant()
    def everyone_runs_or_waits_in_order_of_arrival(self) -> None:
        assert [*self.scheduler.running, *self.scheduler.waiting] == self.live
        assert len(self.scheduler.running) <= self.scheduler.most_sequences
        assert not any(sequence.blocks or sequence.computed for sequence in self.scheduler.waiting)

    @invariant()
    def those_that_run_find_their_own_tokens(self) -> None:
        for sequence in self.scheduler.running:
            assert len(sequence.blocks) == -(-sequence.computed // self.pool.size)
            assert sequence.known == sequence.computed // self.pool.size
            self.require_cached(sequence)

    def require_cached(self, sequence: Sequence) -> None:
        tokens = tuple(sequence.tokens())
        for place in range(sequence.computed):
            assert self.cache[self.slot(sequence, place)] == tokens[: place + 1]

    def slot(self, sequence: Sequence, place: int) -> int:
        return sequence.blocks[place // self.pool.size] * self.pool.size + place % self.pool.size


def test_every_block_is_accounted_for() -> None:
    """And all that may happen did."""
    Accounts.met.clear()
    run_state_machine_as_test(Accounts, settings=settings(max_examples=200, stateful_step_count=40, deadline=None))
    events = "shared", "lost their place", "accepted", "rejected", "cancelled while it ran", "cancelled while it waited"
    assert all(Accounts.met[event] for event in events)
