"""What a single token says, for log-probabilities: bytes, which need not be whole characters."""

import re
from functools import lru_cache
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte that SentencePiece's vocabulary has no word for


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in a byte-level vocabulary."""
    whole = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(value): value for value in whole}
    others = [value for value in range(256) if value not in whole]
    letters |= {chr(256 + at): value for at, value in enumerate(others)}
    assert set(letters) == set(ByteLevel.alphabet())
    return letters


class Spelling:
    """Bytes and texts of tokens.

    Args:
        tokenizer: of transformers, a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._letters = tokenizer, _byte_letters()
        added = tokenizer.added_tokens_decoder
        self._added = {token.content for token in added.values()}
        self._silent = {number for number, token in added.items() if token.special}
        self._byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
        self.bytes = lru_cache(1 << 16)(self._bytes)

    def silent(self, token: int) -> bool:
        """Whether it is left out of texts: an end of sequence and the like."""
        return token in self._silent

    def text(self, token: int) -> str:
        """As OpenAI writes it: the text, or `bytes:\\x..` where it is no whole text."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in raw)

    def _bytes(self, token: int) -> bytes:
        word = self._tokenizer.convert_ids_to_tokens(token) or ""
        if word in self._added:
            return word.encode()
        if self._byte_level:
            return bytes(self._letters[letter] for letter in word if letter in self._letters)
        found = BYTE.fullmatch(word)
        return bytes([int(found[1], 16)]) if found else word.replace("▁", " ").encode()
