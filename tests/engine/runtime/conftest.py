"""Requests that end before their time."""

from collections.abc import Callable

import pytest

from rankwise.engine.runtime.engine import Engine
from rankwise.engine.runtime.sequence import Sequence

STAGES = ("waiting", "reading", "decoding", "put back")


def stage_of(running: Engine, sequence: Sequence) -> str:
    """Where a request is on its way; empty between these stages."""
    if sequence in running.scheduler.waiting:
        return "put back" if sequence.preempted else "waiting"
    if sequence not in running.scheduler.running:
        return ""
    if 0 < sequence.computed < len(sequence.prompt) and not sequence.preempted:
        return "reading"
    drafter = running.drafter
    drafted = drafter is None or (sequence in drafter.shadows and bool(drafter.shadows[sequence].blocks))
    return "decoding" if len(sequence.output) > 4 and drafted else ""


@pytest.fixture
def cancelling() -> Callable[..., None]:
    """`cancelling(running, victims, check)`: steps to the end; cancels each victim in the stage that is its key."""

    def go(running: Engine, victims: dict[str, Sequence], check: Callable[[Engine], None] = lambda _: None) -> None:
        assert tuple(victims) == STAGES
        left = dict(victims)
        for number, _ in enumerate(running.run()):
            assert number < 5000
            check(running)
            for stage, victim in victims.items():
                if stage in left and stage_of(running, victim) == stage:
                    cancel(running, left.pop(stage))
                    check(running)
        assert not left
        assert {victim.finish_reason for victim in victims.values()} == {"cancelled"}

    return go


def cancel(running: Engine, victim: Sequence) -> None:
    """What it holds alone is free at once, what others hold too stays theirs."""
    pool, blocks = running.pool, list(victim.blocks)
    assert bool(blocks) == (victim in running.scheduler.running)
    before, alone = pool.available(), sum(pool.holders[block] == 1 for block in blocks)
    running.cancel(victim)
    assert pool.available() == before + alone
    assert not victim.blocks
    assert victim not in [*running.scheduler.running, *running.scheduler.waiting]
    assert running.drafter is None or victim not in running.drafter.shadows
