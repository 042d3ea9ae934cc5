"""The tensors of one step."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate

import torch

from rankwise.engine.runtime.scheduler import Share


@dataclass(frozen=True)
class Batch:
    """What the decoder is given; sequences with one token come first.

    Args:
        ids: `[T]` int64 tokens of all sequences, one after another.
        positions: `[T]` int32.
        slots: `[T]` int32 where each token's keys and values go.
        tables: `[S, B]` int32 blocks of each sequence.
        contexts: `[S]` int32 keys of each sequence after this step.
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


def make_batch(shares: Many[Share], block_size: int, device: torch.device) -> Batch:
    """Lay out the shares of a step, as `Scheduler.next` orders them."""
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
        if share.samples:
            last.append(len(ids) - 1)
    widest = max(len(share.sequence.blocks) for share in shares)
    tables = [share.sequence.blocks + [0] * (widest - len(share.sequence.blocks)) for share in shares]
    bounds = [0, *accumulate(share.count for share in shares)]

    def whole(values: list[int] | list[list[int]], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return Batch(
        ids=whole(ids, torch.int64),
        positions=whole(positions),
        slots=whole(slots),
        tables=whole(tables),
        contexts=whole(contexts),
        bounds=whole(bounds),
        decoding=sum(share.count == 1 for share in shares),
        last=whole(last, torch.int64),
        longest=max(contexts),
    )
