"""One HTTP request's sequences, as the asyncio side sees them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from rankwise.engine.doors.server.faults import Fault, timed_out
from rankwise.engine.runtime.params import Logprob

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass(frozen=True)
class Piece:
    """One more token of one sequence.

    Args:
        index: of the sequence in its call.
        token: id.
        text: that may be shown now; tokens and texts need not match.
        offset: characters of the sequence's text before this token.
        logprob: if asked for.
        reason: `stop` or `length` with the last token.
        cached: with the last token, how many of the prompt's were not computed again.
        cut: with the last token, whether a stop text ended the text.
    """

    index: int
    token: int
    text: str
    offset: int
    logprob: Logprob | None = None
    reason: str = ""
    cached: int = 0
    cut: bool = False


class Call:
    """Where the pieces of a request's sequences arrive. For the asyncio thread only.

    Args:
        count: sequences.
        timeout: seconds it may take from now.
        on_cancel: tells the engine to forget it.
    """

    def __init__(self, count: int, timeout: float, on_cancel: Callable[["Call"], None]) -> None:
        self.left, self.timeout, self._on_cancel = count, timeout, on_cancel
        self._items: asyncio.Queue[Piece | Fault] = asyncio.Queue()
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._gone: Fault | None = None

    def put(self, item: Piece | Fault) -> None:
        """A piece, or why there are no more."""
        self._items.put_nowait(item)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Every piece as it comes, until all sequences have ended.

        Raises:
            Fault: the engine failed, time is up, the server goes down or the client is gone.
        """
        while self.left:
            try:
                async with asyncio.timeout_at(self._deadline):
                    item = await self._items.get()
            except TimeoutError:
                raise timed_out(self.timeout) from None
            if isinstance(item, Fault):
                raise item
            self.left -= bool(item.reason)
            yield item
        if self._gone is not None:  # seen while a piece was being dealt with
            raise self._gone

    def cancel(self) -> None:
        """Free what it holds in the engine; harmless when it has ended."""
        if self.left:
            self.left = 0
            self._on_cancel(self)

    async def watch(self, receive: Receive) -> None:
        """Wait until the client is gone, then cancel."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = Fault(499, "the client is gone", code="disconnected")
        self.put(self._gone)
        self.cancel()
