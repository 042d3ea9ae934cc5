"""The blocks of the KV cache: who holds which, and which hold a prefix that another request may share.

A full block is known by the hash of its tokens and of all before them. When its last holder lets go it stays known,
and is taken for something else only when no free block is older.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from rankwise.errors import RankwiseError


class BlockPool:
    """Reference counts, free blocks (those without a known prefix first, then by their release), and known prefixes.

    Args:
        count: blocks.
        size: tokens a block.
        share: know full blocks by their tokens (prefix caching).
    """

    def __init__(self, count: int, size: int, *, share: bool = True) -> None:
        if count < 1 or size < 1:
            raise RankwiseError("KV cache", f"{count} blocks of {size} tokens", "at least one of each")
        self.count, self.size, self.share = count, size, share
        self.holders = [0] * count
        self.hashes: list[bytes | None] = [None] * count
        self.free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(count))
        self.known: dict[bytes, int] = {}

    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self.free)

    def take(self) -> int:
        """A block for new content; what it held is forgotten.

        Raises:
            RankwiseError: none is free.
        """
        if not self.free:
            raise RankwiseError("KV cache", "no free block", "this is a fault of the scheduler, please report it")
        block, _ = self.free.popitem(last=False)
        self._forget(block)
        self.holders[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks; the last ones are reused first, as prefixes are what is shared.

        Raises:
            RankwiseError: a block is not held.
        """
        for block in reversed(blocks):
            if self.holders[block] < 1:
                raise RankwiseError("KV cache", f"block {block} released twice", "this is a fault, please report it")
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.free[block] = None
                if self.hashes[block] is None:
                    self.free.move_to_end(block, last=False)  # nothing is lost by using it first

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Hold the known blocks of the longest known prefix, one token at least left over; returns them."""
        found = []
        for digest in self.digests(tokens[: max(0, len(tokens) - 1)]):
            block = self.known.get(digest)
            if block is None:
                break
            found.append(block)
        for block in found:
            self.free.pop(block, None)
            self.holders[block] += 1
        return found

    def learn(self, blocks: Sequence[int], tokens: Sequence[int], done: int = 0) -> int:
        """Make full blocks of a sequence known whose keys and values are written.

        Args:
            blocks: the sequence's.
            tokens: those that are written, from the first.
            done: so many of its blocks were known before.

        Returns:
            How many are known now.
        """
        full = len(tokens) // self.size
        if not self.share or full <= done:
            return done
        for block, digest in list(zip(blocks, self.digests(tokens), strict=False))[done:full]:
            if self.hashes[block] is None and digest not in self.known:
                self.hashes[block], self.known[digest] = digest, block
        return full

    def digests(self, tokens: Sequence[int]) -> list[bytes]:
        """A hash for each full block, of its tokens and all before them; none without sharing."""
        if not self.share:
            return []
        found, digest = [], b""
        for start in range(0, len(tokens) - self.size + 1, self.size):
            content = array("q", tokens[start : start + self.size]).tobytes()
            digest = hashlib.blake2b(digest + content, digest_size=16).digest()  # nobody can aim at another's prefix
            found.append(digest)
        return found

    def _forget(self, block: int) -> None:
        digest, self.hashes[block] = self.hashes[block], None
        if digest is not None:
            del self.known[digest]
