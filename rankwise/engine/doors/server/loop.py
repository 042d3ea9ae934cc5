"""A thread that owns the engine: orders in, one step after another, tokens out to asyncio."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

import torch

from rankwise.engine.doors.server.call import Call, Piece
from rankwise.engine.doors.server.faults import Fault, of_engine, of_input, unavailable
from rankwise.engine.doors.server.metrics import Metrics, State
from rankwise.engine.runtime.llm import LLM
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.sequence import Sequence
from rankwise.engine.runtime.text import TextStream
from rankwise.errors import RankwiseError

Job = tuple[list[int], SamplingParams]
MOST_WAIT = 60  # seconds of Retry-After
RECENT = 0.1  # weight of the latest sequence in the mean time that a sequence takes
JOIN = 10.0  # seconds to wait for the thread's last step

log = logging.getLogger("rankwise.serve")


@dataclass(eq=False)
class Live:
    """A sequence in the engine.

    Args:
        call: it belongs to.
        index: in that call.
        text: of its tokens.
        last: when it was accepted, or got its last token.
        born: when it was accepted.
    """

    call: Call
    index: int
    text: TextStream
    last: float
    born: float = field(default_factory=time.monotonic)


class EngineLoop:
    """The one user of an engine. `submit` and `abort` are for the asyncio thread, methods with `_` for its own.

    Args:
        llm: whose engine it owns from now on.
        capacity: sequences that it accepts at once.
        timeout: seconds a call may take.
        metrics: to keep.
    """

    def __init__(self, llm: LLM, capacity: int, timeout: float, metrics: Metrics) -> None:
        self.llm, self.capacity, self.timeout, self.metrics = llm, capacity, timeout, metrics
        self.failure: Exception | None = None
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._live: dict[Sequence, Live] = {}
        self._open, self._lock = 0, threading.Lock()
        self._stopping, self._seconds = False, 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._publish()

    def start(self) -> None:
        """Begin; call it on the asyncio thread that will submit."""
        self._aio = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is being done."""
        self._orders.put(partial(setattr, self, "_stopping", True))
        self._thread.join(JOIN)

    def submit(self, jobs: list[Job]) -> Call:
        """Accept all sequences of a request, or none.

        Raises:
            Fault: the engine failed (503), or too many wait (429).
        """
        if self.failure is not None:
            raise unavailable(of_engine(self.failure).message, "engine_failed")
        with self._lock:
            if self._open + len(jobs) > self.capacity:
                raise self._full()
            self._open += len(jobs)
        call = Call(len(jobs), self.timeout, lambda call: self._orders.put(partial(self._cancel, call)))
        self._orders.put(partial(self._add, call, jobs, time.monotonic()))
        return call

    def abort(self, fault: Fault) -> None:
        """End all calls with a fault."""
        self._orders.put(partial(self._give_up, fault))

    def _full(self) -> Fault:
        state = self.metrics.state
        rounds = (state.waiting + 1) / self.llm.engine.config.most_sequences
        wait = min(MOST_WAIT, max(1, math.ceil(state.seconds * rounds)))
        message = f"{self.capacity} sequences run or wait already; try again in about {wait} s"
        return Fault(429, message, kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(wait)})

    def _run(self) -> None:
        device = self.llm.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread's own setting; kernels are launched there
        while not self._stopping:
            try:
                self._obey()
                if self.failure is None and self.llm.engine.busy:
                    self._hand_out(self.llm.engine.step())
                    self._publish()
            except Exception as error:
                log.exception("the engine failed; its requests were ended, and it takes no more")
                self.failure = error
                self._give_up(of_engine(error))

    def _obey(self) -> None:
        """All orders that are there; while nothing is to be computed, wait for one."""
        idle = self.failure is not None or not self.llm.engine.busy
        try:
            while True:
                self._orders.get(block=idle)()
                idle = False
        except Empty:
            pass

    def _add(self, call: Call, jobs: list[Job], now: float) -> None:
        if self.failure is not None:
            self._forget(len(jobs))
            return self._tell([(call, of_engine(self.failure))])
        for index, (prompt, params) in enumerate(jobs):
            try:
                text = TextStream(self.llm.tokenizer, params.stop, prompt)
            except Exception as error:  # of the tokenizer, as below
                log.exception("a prompt has no text; its request was ended")
                return self._refuse(call, len(jobs) - index, of_engine(error))
            try:
                sequence = self.llm.engine.add(prompt, params)
            except RankwiseError as error:
                return self._refuse(call, len(jobs) - index, of_input(error))
            self._live[sequence] = Live(call, index, text, now, now)
        self._publish()

    def _refuse(self, call: Call, left: int, fault: Fault) -> None:
        """End a call of which so many sequences were not added."""
        self._forget(left)
        self._cancel(call)
        self._tell([(call, fault)])

    def _cancel(self, call: Call) -> None:
        for sequence in [sequence for sequence, live in self._live.items() if live.call is call]:
            self.llm.engine.cancel(sequence)
            self._end(sequence)
        self._publish()

    def _give_up(self, fault: Fault) -> None:
        calls = {live.call for live in self._live.values()}
        for sequence in list(self._live):
            if self.failure is None:  # a broken engine is left as it is
                self.llm.engine.cancel(sequence)
            self._end(sequence)
        self._tell([(call, fault) for call in calls])
        self._publish()

    def _hand_out(self, grown: list[Sequence]) -> None:
        now, told = time.monotonic(), list[tuple[Call, Piece | Fault]]()
        for sequence in grown:
            self.metrics.generated_tokens.inc(sequence.fresh)
            live = self._live.get(sequence)
            if live is None:  # its call was given up in this very step
                continue
            first = len(sequence.output) - sequence.fresh
            for at in range(first, len(sequence.output)):  # several at once with a draft: they share the wait
                wait = self.metrics.between if at else self.metrics.first
                wait.observe((now - live.last) / sequence.fresh)
            live.last = now
            try:
                told += [(live.call, piece) for piece in self._pieces(sequence, live, first)]
            except Exception as error:  # of the tokenizer: this text's trouble, not the engine's
                log.exception("a token has no text; its request was ended")
                told.append((live.call, of_engine(error)))
                self._cancel(live.call)
        self._tell(told)

    def _pieces(self, sequence: Sequence, live: Live, first: int) -> list[Piece]:
        """Of the output's tokens from `first`; what comes after a stop text is dropped."""
        pieces = []
        for at in range(first, len(sequence.output)):
            offset = len(live.text.text)
            text = live.text.push(sequence.output[at])
            if live.text.stopped:
                self.llm.engine.finish(sequence, "stop", at + 1)
            ended = sequence.finish_reason if at + 1 == len(sequence.output) else ""
            logprob = sequence.logprobs[at] if sequence.logprobs else None
            text += live.text.finish() if ended else ""
            end = ended, sequence.cached, live.text.stopped
            pieces.append(Piece(live.index, sequence.output[at], text, offset, logprob, *end))
            if ended:
                break
        if sequence.finish_reason:
            self._seconds += (RECENT if self._seconds else 1) * (live.last - live.born - self._seconds)
            self._end(sequence)
        return pieces

    def _end(self, sequence: Sequence) -> None:
        del self._live[sequence]
        self._forget(1)

    def _forget(self, count: int) -> None:
        with self._lock:
            self._open -= count

    def _tell(self, items: list[tuple[Call, Piece | Fault]]) -> None:
        def put() -> None:
            for call, item in items:
                call.put(item)

        if items:
            self._aio.call_soon_threadsafe(put)

    def _publish(self) -> None:
        scheduler, pool = self.llm.engine.scheduler, self.llm.engine.pool
        used = pool.count - pool.available()
        waiting, running = len(scheduler.waiting), len(scheduler.running)
        self.metrics.state = State(waiting, running, used, pool.count, self._seconds)
        self.metrics.note(self.llm.speculation)
