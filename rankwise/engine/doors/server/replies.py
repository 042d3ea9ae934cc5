"""Answers in OpenAI's shapes: whole ones, and the chunks of a stream."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable
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
        choices: to come.
        spelling: of tokens.
        logprobs: whether they are wanted.
        wants_usage: whether a stream ends with what it used.
    """

    name = stream_name = prefix = ""

    def __init__(
        self, model: str, prompt_tokens: int, choices: int, spelling: Spelling, logprobs: bool, wants_usage: bool
    ) -> None:
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(16)}", "created": int(time.time()), "model": model}
        self.prompt_tokens, self.wants_usage = prompt_tokens, wants_usage
        self.spelling, self.logprobs = spelling, logprobs
        self.pieces: list[list[Piece]] = [[] for _ in range(choices)]
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
        """Keep a piece for `whole`."""
        self._count(piece)
        self.pieces[piece.index].append(piece)

    def whole(self) -> Json:
        """The answer, when all pieces are there."""
        choices = [
            {
                "index": index,
                **self._content("".join(piece.text for piece in pieces)),
                "logprobs": self._logprobs(pieces),
                "finish_reason": pieces[-1].reason,
            }
            for index, pieces in enumerate(self.pieces)
        ]
        return {**self.head, "object": self.name, "choices": choices, "usage": self.usage()}

    async def stream(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """Server-sent events, up to `[DONE]`."""
        for index in range(len(self.pieces)):
            for choice in self._opening(index):
                yield self._event([choice])
        async for piece in pieces:
            self._count(piece)
            if piece.text or piece.reason or self.logprobs:
                reason = piece.reason or None
                content = self._delta(piece.text)
                choice = {"index": piece.index, **content, "logprobs": self._logprobs([piece]), "finish_reason": reason}
                yield self._event([choice])
        if self.wants_usage:
            yield self._event([], self.usage())
        yield b"data: [DONE]\n\n"

    def _event(self, choices: list[Json], usage: Json | None = None) -> bytes:
        more = {"usage": usage} if self.wants_usage else {}
        body = {**self.head, "object": self.stream_name, "choices": choices, **more}
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    def _count(self, piece: Piece) -> None:
        self.generated += 1
        self.cached += piece.cached if piece.reason else 0

    def _logprobs(self, pieces: Iterable[Piece]) -> Json | None:
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
