"""Whatever is allocated, shared, freed and preempted, in any order: no block is lost, none is given twice."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rankwise.engine.runtime.blocks import BlockPool
from rankwise.errors import RankwiseError

COUNT, SIZE = 12, 2


class Pool(RuleBasedStateMachine):
    """Sequences over a tiny alphabet, so that they begin alike often."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(COUNT, SIZE)
        self.sequences: list[tuple[list[int], list[int]]] = []

    @rule(target=held, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def start(self, tokens: list[int]) -> int:
        blocks = self.pool.match(tokens)
        assert len(blocks) * SIZE < len(tokens)
        needed = -(-len(tokens) // SIZE) - len(blocks)
        if needed > self.pool.available():
            self.pool.release(blocks)
            self.sequences.append(([], []))
        else:
            known = len(blocks)
            blocks += [self.pool.take() for _ in range(needed)]
            self.pool.learn(blocks, tokens, known)
            self.sequences.append((blocks, tokens))
        return len(self.sequences) - 1

    @rule(number=held)
    def grow(self, number: int) -> None:
        blocks, tokens = self.sequences[number]
        if blocks and self.pool.available():
            if len(tokens) % SIZE == 0:
                blocks.append(self.pool.take())
            tokens.append(1)
            self.pool.learn(blocks, tokens, (len(tokens) - 1) // SIZE)

    @rule(number=consumes(held))
    def stop(self, number: int) -> None:
        self.pool.release(self.sequences[number][0])
        self.sequences[number] = ([], [])

    @invariant()
    def every_block_is_where_it_should_be(self) -> None:
        holders = Counter(block for blocks, _ in self.sequences for block in blocks)
        assert [holders[block] for block in range(COUNT)] == self.pool.holders
        assert {block for block in range(COUNT) if not holders[block]} == set(self.pool.free)
        assert {digest: block for block, digest in enumerate(self.pool.hashes) if digest} == self.pool.known

    @invariant()
    def shared_blocks_hold_the_same_tokens(self) -> None:
        content: dict[int, list[int]] = {}
        for blocks, tokens in self.sequences:
            for at, block in enumerate(blocks[: len(tokens) // SIZE]):
                assert content.setdefault(block, tokens[: (at + 1) * SIZE]) == tokens[: (at + 1) * SIZE]


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_block_is_released_once() -> None:
    pool = BlockPool(2, 4)
    block = pool.take()
    pool.release([block])
    with pytest.raises(RankwiseError, match=f"block {block} released twice"):
        pool.release([block])


def test_an_empty_pool_says_so() -> None:
    pool = BlockPool(1, 4)
    pool.take()
    with pytest.raises(RankwiseError, match="no free block"):
        pool.take()
    with pytest.raises(RankwiseError, match="KV cache: 0 blocks of 16 tokens"):
        BlockPool(0, 16)


def test_a_released_prefix_stays_known_until_its_block_is_needed() -> None:
    pool, tokens = BlockPool(3, 2), [1, 2, 3, 4, 5]
    blocks = [pool.take() for _ in range(3)]
    pool.learn(blocks, tokens)
    pool.release(blocks)
    assert pool.match(tokens) == blocks[:2]
    pool.release(blocks[:2])
    taken = [pool.take() for _ in range(3)]
    assert taken[-1] == blocks[0]  # the beginning of a prefix goes last
    assert pool.match(tokens) == []


def test_without_sharing_nothing_is_known() -> None:
    pool = BlockPool(2, 2, share=False)
    blocks = [pool.take(), pool.take()]
    assert pool.learn(blocks, [1, 2, 3, 4]) == 0
    pool.release(blocks)
    assert pool.match([1, 2, 3, 4, 5]) == []
