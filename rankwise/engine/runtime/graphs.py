"""Decoding on a GPU as captured graphs: a step in which sequences bring few tokens is one launch, not hundreds.

A graph has fixed tensors and fixed sizes, so there is one for each bucket of tokens and of context length, captured
when it is first needed. It sees each token as a sequence of its own that ends there: a draft that is verified, or a
short piece of a prompt, needs no other graph. Rows beyond a step's tokens are padding: they have no keys and write
nowhere. All graphs read the same input buffers and share one memory pool, as only one of them runs at a time.
"""

from bisect import bisect_left
from collections.abc import Callable

import torch

from rankwise.engine.runtime import hostblocks
from rankwise.engine.runtime.batch import Batch
from rankwise.engine.runtime.decoder import Decoder
from rankwise.kernels.backend import use_triton

Forward = Callable[[Batch], torch.Tensor]
Run = Callable[[], torch.Tensor]
SHORTEST = 512  # keys of the smallest bucket of contexts; the others double
FEW = 8  # tokens of a sequence, on average: each reads the keys before it anew


def batch_buckets(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24 and so on in steps of 8, up to `most` tokens."""
    return [size for size in (1, 2, 4, *range(8, most, 8)) if size < most] + [most]


def context_buckets(most: int) -> list[int]:
    """Powers of two from `SHORTEST`, up to `most` keys."""
    found = [min(SHORTEST, most)]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found


def forward(
    decoder: Decoder,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    most_rows: int,
    most_length: int,
    graphs: bool,
) -> Forward:
    """What runs the steps of an engine: graphs where the device has them and every kernel can be captured, on a CPU
    `native_blocks.c` where it is there.

    Args:
        decoder: weights.
        keys: its cache, as `Decoder.__call__` takes it.
        values: likewise.
        most_rows: tokens of a step that is to run as a graph.
        most_length: keys of a sequence.
        graphs: whether they are wanted.
    """
    if graphs and decoder.embed.is_cuda and use_triton(decoder.embed):
        return Graphs(decoder, keys, values, most_rows, most_length, Capture(decoder.embed.device))
    if hostblocks.suits(decoder, keys, values):
        return hostblocks.HostBlocks(decoder, keys, values)
    return lambda batch: decoder(batch, keys, values)


class Capture:
    """Captures on one stream into one memory pool.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """`run` as a graph. It is run as it is before that: kernels are compiled, libraries take their memory."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                logits = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


class Graphs:
    """Chooses a graph for a step, or lets the decoder run where none fits.

    The logits that it gives back are good until the next step.

    Args:
        decoder: weights.
        keys: its cache.
        values: likewise.
        most_rows: tokens of a step; more run without a graph.
        most_length: keys of a sequence; more run without a graph.
        capture: makes of a function without arguments one that does the same again on whatever the input buffers
            then hold: `Capture` on a GPU. It may return the function itself.
    """

    def __init__(
        self,
        decoder: Decoder,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        most_rows: int,
        most_length: int,
        capture: Callable[[Run], Run],
    ) -> None:
        self.decoder, self.keys, self.values, self.capture = decoder, keys, values, capture
        self.sizes, self.lengths = batch_buckets(most_rows), context_buckets(most_length)
        self.graphs: dict[tuple[int, int], Run] = {}
        self.replayed = 0
        device, most = decoder.embed.device, self.sizes[-1]
        self.ids, self.rows = torch.zeros(most, dtype=torch.int64, device=device), torch.arange(most, device=device)
        self.positions, self.slots, self.contexts = torch.zeros(3, most, dtype=torch.int32, device=device).unbind()
        widest = -(-most_length // keys[0].shape[1])
        self.tables = torch.zeros(most, widest, dtype=torch.int32, device=device)
        self.bounds = torch.arange(most + 1, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits of the rows that the batch wants, `[N, vocabulary]`; writes the cache."""
        key = self.bucket(batch)
        if key is None:
            return self.decoder(batch, self.keys, self.values)
        self._fill(batch, key[0])
        if key not in self.graphs:
            static = self._static(*key)
            self.graphs[key] = self.capture(lambda: self.decoder(static, self.keys, self.values))
        logits = self.graphs[key]()
        self.replayed += 1
        n = len(batch.ids)
        return logits[:n] if len(batch.last) == n else logits.index_select(0, batch.last)

    def bucket(self, batch: Batch) -> tuple[int, int] | None:
        """Tokens and keys of the smallest graph that holds a step; None where there is none."""
        n = len(batch.ids)
        if n > self.sizes[-1] or n > FEW * len(batch.contexts) or batch.longest > self.lengths[-1]:
            return None
        if batch.tables.shape[1] > self.tables.shape[1]:
            return None
        return self.sizes[bisect_left(self.sizes, n)], self.lengths[bisect_left(self.lengths, batch.longest)]

    def _fill(self, batch: Batch, size: int) -> None:
        """Put a step into the input buffers, and padding after it."""
        n = len(batch.ids)
        tables, contexts = apart(batch)
        given = (self.ids, batch.ids, 0), (self.positions, batch.positions, 0)
        for buffer, values, empty in (*given, (self.slots, batch.slots, -1), (self.contexts, contexts, 0)):
            buffer[:n].copy_(values)
            if n < size:
                buffer[n:size].fill_(empty)
        self.tables[:n, : tables.shape[1]].copy_(tables)

    def _static(self, size: int, length: int) -> Batch:
        """The input buffers as a batch of a bucket's size."""
        return Batch(
            ids=self.ids[:size],
            positions=self.positions[:size],
            slots=self.slots[:size],
            tables=self.tables[:size],
            contexts=self.contexts[:size],
            bounds=self.bounds[: size + 1],
            decoding=size,
            last=self.rows[:size],
            longest=length,
        )


def apart(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables `[T, B]` and contexts `[T]` of a step whose every token is taken for a sequence that ends with it."""
    n = len(batch.ids)
    if batch.decoding == n:
        return batch.tables, batch.contexts
    rows = torch.arange(n, dtype=torch.int32, device=batch.ids.device)
    owners = torch.searchsorted(batch.bounds[1:], rows, right=True, out_int32=True)
    owners = owners.clamp_(max=len(batch.contexts) - 1)  # padding has none
    return batch.tables.index_select(0, owners), torch.where(batch.slots < 0, 0, batch.positions + 1)
