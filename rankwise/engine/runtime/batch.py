"""The tensors of one step."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from rankwise.engine.runtime.scheduler import Share

ALIGN = 64  # bytes; kernels are compiled for addresses that are multiples of 16 and for others
HOST_MULTIPLE = 16  # tokens: on a CPU the library keeps compiled code for every number of rows that it has met


@dataclass(frozen=True)
class Batch:
    """What the decoder is given; sequences with one token come first.

    Args:
        ids: `[T]` int64 tokens of all sequences, one after another; those past the last sequence are padding.
        positions: `[T]` int32.
        slots: `[T]` int32 where each token's keys and values go; -1 for padding: nowhere.
        tables: `[S, B]` int32 blocks of each sequence.
        contexts: `[S]` int32 keys of each sequence after this step; 0 for padding.
        bounds: `[S + 1]` int32 where each sequence's tokens start.
        decoding: so many sequences bring one token.
        last: `[N]` int64 rows whose logits are wanted.
        longest: the largest context.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    contexts: torch.Tensor
    bounds: torch.Tensor
    decoding: int
    last: torch.Tensor
    longest: int

    @cached_property
    def single(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables and contexts of the sequences with one token."""
        return self.tables[: self.decoding], self.contexts[: self.decoding]

    @cached_property
    def several(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tables, bounds and contexts of the others; bounds count from their first token."""
        n = self.decoding
        return self.tables[n:], self.bounds[n:] - n, self.contexts[n:]


def make_batch(shares: Many[Share], block_size: int, device: torch.device) -> Batch:
    """Lay out the shares of a step, as `Scheduler.next` orders them.

    On a CPU a step of more than `HOST_MULTIPLE` tokens, not all of them single, is padded to a multiple of it.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last: list[int] = []
    contexts: list[int] = []
    for share in shares:
        sequence, start = share.sequence, share.sequence.computed
        ids += sequence.tokens(start, start + share.count)
        positions += range(start, start + share.count)
        blocks = sequence.blocks
        slots += [blocks[at // block_size] * block_size + at % block_size for at in range(start, start + share.count)]
        contexts.append(start + share.count)
        last += range(len(ids) - share.wanted, len(ids))
    widest = max(len(share.sequence.blocks) for share in shares)
    held = [share.sequence.blocks for share in shares]
    tables = [block for blocks in held for block in blocks + [0] * (widest - len(blocks))]
    bounds = [0, *accumulate(share.count for share in shares)]
    decoding = sum(share.count == 1 for share in shares)
    if device.type == "cpu" and decoding < len(shares) and len(ids) > HOST_MULTIPLE:
        padding = -len(ids) % HOST_MULTIPLE
        ids, positions, slots = ids + [0] * padding, positions + [0] * padding, slots + [-1] * padding
    names = "ids", "last", "positions", "slots", "contexts", "bounds", "tables"
    placings = placed([ids, last], [positions, slots, contexts, bounds, tables], device)
    found = dict(zip(names, placings, strict=True))
    found["tables"] = found["tables"].view(len(shares), widest)
    return Batch(**found, decoding=decoding, longest=max(contexts))


def placed(wide: Many[list[int]], narrow: Many[list[int]], device: torch.device) -> list[torch.Tensor]:
    """Lists as tensors on a device, in one copy: many small ones would take longer than many a step.

    Args:
        wide: those that become int64; from 0 to 2³¹ - 1.
        narrow: those that become int32.
        device: where to.

    Returns:
        The wide ones, then the narrow ones, each from an address that is a multiple of `ALIGN` bytes on.
    """
    flat: list[int] = []
    begins = []
    halved = [[half for value in values for half in (value, 0)] for values in wide]  # the low half comes first
    for values in (*halved, *narrow):
        begins.append(len(flat))
        flat += values
        flat += [0] * (-len(flat) % (ALIGN // 4))
    there = torch.tensor(flat, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    whole = there.view(torch.int64)
    found = [whole[at // 2 : at // 2 + len(values)] for at, values in zip(begins, wide, strict=False)]
    return found + [there[at : at + len(values)] for at, values in zip(begins[len(wide) :], narrow, strict=True)]
