"""From tokens to text while they come: pieces that are whole characters, and nothing of a stop text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

BEFORE = 8  # tokens of the prompt that say how the first of the output is written, after a space or without
HALF = "\ufffd"  # what a decoder writes for a character that is not all there


class TextStream:
    """The text of one output.

    Args:
        tokenizer: of transformers, a fast one.
        stop: texts that end the output.
        prompt: ids that the output follows; the space between the two is part of the output.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        before = [int(token) for token in prompt[-BEFORE:]]
        whole = not tokenizer.decode(before, skip_special_tokens=True).endswith(HALF)  # else it would be shown with it
        self.stream = DecodeStream(ids=before if whole else [], skip_special_tokens=True)
        self.text, self.given, self.stopped = "", 0, False

    def push(self, token: int) -> str:
        """Take a token; returns what may be shown now: not what could still become a stop text."""
        if not self.stopped:
            self.text += self.stream.step(self.tokenizer._tokenizer, token) or ""
            found = [at for at in (self.text.find(text) for text in self.stop) if at >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        return self._show(len(self.text) if self.stopped else len(self.text) - self._held())

    def finish(self) -> str:
        """What was held back."""
        return self._show(len(self.text))

    def _held(self) -> int:
        """Characters at the end that begin a stop text."""
        longest = 0
        for text in self.stop:
            for length in range(min(len(text) - 1, len(self.text)), longest, -1):
                if self.text.endswith(text[:length]):
                    longest = length
                    break
        return longest

    def _show(self, end: int) -> str:
        piece, self.given = self.text[self.given : end], max(self.given, end)
        return piece


@dataclass
class Output:
    """What a request came to so far.

    Args:
        text: of its tokens.
        unread: what may be shown and was not yet.
        error: why its tokens became no text; the request was cancelled then.
    """

    text: TextStream
    unread: str = ""
    error: Exception | None = None

    def require_text(self) -> None:
        """Raise that error, if there is one."""
        if self.error is not None:
            raise self.error

    def take(self) -> str:
        """What may be shown and was not yet; now it was."""
        piece, self.unread = self.unread, ""
        return piece
