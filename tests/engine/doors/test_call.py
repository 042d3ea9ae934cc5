"""The pieces of one request, whatever comes in between."""

import asyncio
from typing import Any

import pytest

pytest.importorskip("fastapi")

from rankwise.engine.doors.server.call import Call, Piece
from rankwise.engine.doors.server.faults import Fault


def piece(reason: str = "") -> Piece:
    return Piece(0, 7, "a", 0, reason=reason)


async def gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def test_a_client_that_goes_while_a_piece_is_dealt_with_is_noticed() -> None:
    """Not the end of an answer: nothing may be made of the pieces so far."""

    async def run() -> list[Call]:
        cancelled: list[Call] = []
        call = Call(2, 10.0, cancelled.append)
        call.put(piece())
        seen = []

        async def answer() -> None:
            async for each in call.pieces():
                seen.append(each)
                await call.watch(gone)

        with pytest.raises(Fault, match="gone"):
            await answer()
        assert len(seen) == 1
        return cancelled

    assert len(asyncio.run(run())) == 1


def test_all_pieces_of_all_sequences_come() -> None:
    async def run() -> int:
        call = Call(2, 10.0, lambda _: None)
        for reason in ("", "stop", "", "length"):
            call.put(piece(reason))
        return len([each async for each in call.pieces()])

    assert asyncio.run(run()) == 4
