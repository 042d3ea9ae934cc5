"""The engine: requests in, tokens out, one step at a time. It knows tokens, not text; one thread at a time uses it."""

import secrets
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from rankwise.engine.runtime.batch import make_batch
from rankwise.engine.runtime.blocks import BlockPool
from rankwise.engine.runtime.decoder import Decoder
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.sampler import choose
from rankwise.engine.runtime.scheduler import Scheduler
from rankwise.engine.runtime.sequence import Sequence


@dataclass(frozen=True)
class EngineConfig:
    """Limits.

    Args:
        blocks: of the KV cache.
        block_size: tokens a block.
        most_sequences: that run at once.
        most_tokens: of one step; longer prompts come in chunks.
        most_length: tokens of a sequence, its output included.
        share: keep the blocks of finished prompts for others that begin alike.
    """

    blocks: int
    block_size: int = 16
    most_sequences: int = 64
    most_tokens: int = 1024
    most_length: int = 2048
    share: bool = True


class Engine:
    """A decoder, its KV cache and the requests that share them.

    Args:
        decoder: weights.
        config: limits.
        eos: ids that end a sequence.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig, eos: Many[int] = ()) -> None:
        self.decoder, self.config, self.eos = decoder, config, frozenset(eos)
        self.pool = BlockPool(config.blocks, config.block_size, share=config.share)
        limits = {"most_tokens": config.most_tokens, "most_length": config.most_length}
        self.scheduler = Scheduler(self.pool, most_sequences=config.most_sequences, **limits)
        shape, like = decoder.shape, decoder.embed
        size = (config.blocks, config.block_size, shape.kv_heads, shape.head_dim)
        self.keys, self.values = ([like.new_empty(size) for _ in decoder.blocks] for _ in range(2))

    def add(self, prompt: Many[int], params: SamplingParams) -> Sequence:
        """Take a request; it runs in the steps that follow.

        Raises:
            RankwiseError: the prompt is empty or too long.
        """
        seed = secrets.randbits(63) if params.seed is None else params.seed
        sequence = Sequence(list(prompt), params, torch.Generator().manual_seed(seed))
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Stop a request; what it holds is free at once. Harmless for one that is finished."""
        if not sequence.finish_reason:
            self.finish(sequence, "cancelled")

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a request, e.g. at a stop text; of one that just ended for its length the reason is put right."""
        if not sequence.finish_reason:
            self.scheduler.remove(sequence)
        sequence.finish_reason = reason

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def step(self) -> list[Sequence]:
        """One pass through the decoder; the sequences that got a token."""
        shares = self.scheduler.next()
        if not shares:
            return []
        batch = make_batch(shares, self.pool.size, self.decoder.embed.device)
        logits = self.decoder(batch, self.keys, self.values)
        grown = [share.sequence for share in shares if share.samples]
        for share in shares:
            self.scheduler.done(share)
        if grown:
            self._append(grown, logits)
        return grown

    def run(self) -> Iterator[list[Sequence]]:
        """Steps until nothing is left to do."""
        while self.busy:
            yield self.step()

    @property
    def cache_bytes(self) -> int:
        """Of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @torch.inference_mode()
    def _append(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        tokens, logprobs = choose(logits, sequences)
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            sequence.output.append(token)
            if logprob is not None:
                sequence.logprobs.append(logprob)
            reason = self._reason(sequence, token)
            if reason:
                self.finish(sequence, reason)

    def _reason(self, sequence: Sequence, token: int) -> str:
        params = sequence.params
        if token in params.stop_token_ids or (token in self.eos and not params.ignore_eos):
            return "stop"
        full = len(sequence.output) >= params.max_tokens or sequence.length >= self.scheduler.most_length
        return "length" if full else ""
