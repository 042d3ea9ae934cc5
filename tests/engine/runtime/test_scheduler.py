"""Steps stay within their limits, and everyone gets a turn."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.engine.runtime.blocks import BlockPool
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.scheduler import Scheduler
from rankwise.engine.runtime.sequence import Sequence


def make(blocks: int = 10, size: int = 2, sequences: int = 4, tokens: int = 6, length: int = 16) -> Scheduler:
    return Scheduler(BlockPool(blocks, size), most_sequences=sequences, most_tokens=tokens, most_length=length)


def request(length: int, start: int = 0) -> Sequence:
    return Sequence(list(range(start, start + length)), SamplingParams())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 14), st.integers(1, 8)), min_size=1, max_size=8),
    st.integers(8, 30),
    st.integers(1, 9),
)
def test_every_request_ends_and_no_step_is_too_large(wanted: list[tuple[int, int]], blocks: int, tokens: int) -> None:
    scheduler = make(blocks=blocks, tokens=tokens)
    left = {}
    for number, (length, new) in enumerate(wanted):
        sequence = request(length, 100 * number)
        left[sequence] = min(new, 16 - length)
        scheduler.add(sequence)
    for _ in range(3000):
        shares = scheduler.next()
        if not shares:
            break
        assert sum(share.count for share in shares) <= tokens
        assert len(scheduler.running) <= 4
        assert len({share.sequence for share in shares}) == len(shares)
        assert sorted(share.count > 1 for share in shares) == [share.count > 1 for share in shares]
        for share in shares:
            assert len(share.sequence.blocks) * 2 >= share.sequence.computed + share.count
            scheduler.done(share)
            if share.sequence.left == 0:
                share.sequence.output.append(7)
                left[share.sequence] -= 1
                if left[share.sequence] == 0:
                    scheduler.remove(share.sequence)
    assert not any(left.values())
    assert scheduler.pool.available() == blocks


def test_those_who_came_first_run_first() -> None:
    scheduler = make(sequences=2)
    requests = [request(2, 10 * n) for n in range(3)]
    for each in requests:
        scheduler.add(each)
    assert [share.sequence for share in scheduler.next()] == requests[:2]
    assert list(scheduler.waiting) == requests[2:]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    scheduler = make(blocks=5, tokens=8, length=10)
    old, young, late = request(4), request(3, 50), request(1, 90)
    for each in (old, young, late):
        scheduler.add(each)
    while not young.preempted:
        shares = scheduler.next()
        for share in shares:
            scheduler.done(share)
            share.sequence.output.append(1)
    assert [share.sequence for share in shares] == [old]
    assert (young.blocks, young.computed, old.preempted) == ([], 0, 0)
    assert list(scheduler.waiting) == [young, late]


def test_removing_frees_waiting_and_running_alike() -> None:
    scheduler = make(sequences=1)
    first, second = request(4), request(4, 50)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.next()
    scheduler.remove(second)
    scheduler.remove(first)
    assert not scheduler.waiting
    assert not scheduler.running
    assert scheduler.pool.available() == 10


@pytest.mark.parametrize("length", [0, 16, 99])
def test_prompts_that_leave_no_room(length: int) -> None:
    from rankwise.errors import RankwiseError

    with pytest.raises(RankwiseError, match="allowed: 1 to 15"):
        make().add(request(length))
