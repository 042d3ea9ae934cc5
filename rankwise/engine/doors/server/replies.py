"""Answers in OpenAI's shapes: whole ones, and the chunks of a stream."""

import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from rankwise.engine.doors.server.call import Piece
from rankwise.engine.doors.server.spelling import Spelling
from rankwise.engine.runtime.params import Logprob

Json = dict[str, Any]


class Reply:
    """What both kinds have in common; one for each request.

    Args:
        model: its name.
        prompt_tokens: of all prompts.
        prompts: how many.
        choices: to come, the first prompt's first.
        spelling: of tokens.
        logprobs: whether they are wanted.
        wants_usage: whether a stream ends with what it used.
    """

    name = stream_name = prefix = ""

    def __init__(
        self,
        model: str,
        prompt_tokens: int,
        prompts: int,
        choices: int,
        spelling: Spelling,
        logprobs: bool,
        wants_usage: bool,
    ) -> None:
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(16)}", "created": int(time.time()), "model": model}
        self.prompt_tokens, self.wants_usage = prompt_tokens, wants_usage
        self.spelling, self.logprobs = spelling, logprobs
        self.pieces: list[list[Piece]] = [[] for _ in range(choices)]
        self.each = choices // prompts  # of a prompt
        self.generated = self.cached = 0

    def usage(self) -> Json:
        """Tokens so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt_tokens + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def add(self, piece: Piece) -> None:
        """Keep a piece."""
        self.generated += 1
        self.cached += piece.cached if piece.reason and piece.index % self.each == 0 else 0
        self.pieces[piece.index].append(piece)

    def whole(self) -> Json:
        """The answer, when all pieces are there."""
        choices = [self._choice(index, pieces) for index, pieces in enumerate(self.pieces)]
        return {**self.head, "object": self.name, "choices": choices, "usage": self.usage()}

    async def stream(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """Server-sent events, up to `[DONE]`."""
        shown = [0] * len(self.pieces)
        for index in range(len(self.pieces)):
            for choice in self._opening(index):
                yield self._event([choice])
        async for piece in pieces:
            self.add(piece)
            shown[piece.index] += len(piece.text)
            for choice in self._grown(piece, shown[piece.index]):
                yield self._event([choice])
        if self.wants_usage:
            yield self._event([], self.usage())
        yield b"data: [DONE]\n\n"

    def _grown(self, piece: Piece, shown: int) -> Iterator[Json]:
        """What a piece adds to a stream; a token's log-probability comes when its text begins to be shown."""
        index, held = piece.index, self.pieces[piece.index]
        end = math.inf if piece.reason and not piece.cut else shown
        told = self._said(held, end) if self.logprobs else []
        self.pieces[index] = [each for each in held if self.logprobs and each.offset >= end]
        for each in told[:-1]:
            yield {"index": index, **self._delta(""), "logprobs": self._logprobs([each]), "finish_reason": None}
        if piece.text or piece.reason or told:
            known = self._logprobs(told[-1:]) if told else None
            yield {"index": index, **self._delta(piece.text), "logprobs": known, "finish_reason": piece.reason or None}

    def _choice(self, index: int, pieces: list[Piece]) -> Json:
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        known = self._logprobs(self._said(pieces, len(text) if last.cut else math.inf))
        return {"index": index, **self._content(text), "logprobs": known, "finish_reason": last.reason}

    def _said(self, pieces: list[Piece], end: float) -> list[Piece]:
        """Those that begin in the first `end` characters of the text and are no special tokens, which have no text."""
        return [piece for piece in pieces if piece.offset < end and not self.spelling.silent(piece.token)]

    def _event(self, choices: list[Json], usage: Json | None = None) -> bytes:
        more = {"usage": usage} if self.wants_usage else {}
        body = {**self.head, "object": self.stream_name, "choices": choices, **more}
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    def _logprobs(self, pieces: list[Piece]) -> Json | None:
        some = [(piece, piece.logprob) for piece in pieces if piece.logprob is not None]
        return self._spelled(some) if self.logprobs else None

    def _content(self, text: str) -> Json:
        raise NotImplementedError

    def _delta(self, text: str) -> Json:
        raise NotImplementedError

    def _opening(self, index: int) -> Iterable[Json]:
        raise NotImplementedError

    def _spelled(self, some: list[tuple[Piece, Logprob]]) -> Json:
        raise NotImplementedError


class CompletionReply(Reply):
    """Of `/v1/completions`."""

    name = stream_name = "text_completion"
    prefix = "cmpl"

    def _content(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str) -> Json:
        return {"text": text}

    def _opening(self, index: int) -> Iterable[Json]:
        return ()

    def _spelled(self, some: list[tuple[Piece, Logprob]]) -> Json:
        text = self.spelling.text
        return {
            "tokens": [text(piece.token) for piece, _ in some],
            "token_logprobs": [known.chosen for _, known in some],
            "top_logprobs": [{text(token): value for token, value in known.top.items()} for _, known in some],
            "text_offset": [piece.offset for piece, _ in some],
        }


class ChatReply(Reply):
    """Of `/v1/chat/completions`."""

    name, stream_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def _opening(self, index: int) -> Iterable[Json]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def _spelled(self, some: list[tuple[Piece, Logprob]]) -> Json:
        def one(token: int, value: float) -> Json:
            return {"token": self.spelling.text(token), "logprob": value, "bytes": [*self.spelling.bytes(token)]}

        return {
            "content": [
                one(piece.token, known.chosen) | {"top_logprobs": [one(*item) for item in known.top.items()]}
                for piece, known in some
            ],
            "refusal": None,
        }
