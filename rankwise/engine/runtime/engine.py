"""The engine: requests in, tokens out, one step at a time. It knows tokens, not text; one thread at a time uses it."""

import secrets
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from rankwise.engine.runtime.acceptance import Choices, choose
from rankwise.engine.runtime.batch import make_batch
from rankwise.engine.runtime.blocks import BlockPool
from rankwise.engine.runtime.decoder import Decoder
from rankwise.engine.runtime.graphs import forward
from rankwise.engine.runtime.memory import make_cache
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.scheduler import Scheduler, Share
from rankwise.engine.runtime.sequence import Sequence
from rankwise.engine.runtime.speculative import Drafter, Tally


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
        graphs: on a GPU, steps of few tokens run as captured CUDA graphs.
    """

    blocks: int
    block_size: int = 16
    most_sequences: int = 64
    most_tokens: int = 1024
    most_length: int = 2048
    share: bool = True
    graphs: bool = True


class Engine:
    """A decoder, its KV cache and the requests that share them.

    Args:
        decoder: weights.
        config: limits.
        eos: ids that end a sequence.
        drafter: guesses ahead; the outputs are distributed as without it.
    """

    def __init__(
        self, decoder: Decoder, config: EngineConfig, eos: Many[int] = (), drafter: Drafter | None = None
    ) -> None:
        self.decoder, self.config, self.eos, self.drafter = decoder, config, frozenset(eos), drafter
        self.pool = BlockPool(config.blocks, config.block_size, share=config.share)
        limits = {"most_tokens": config.most_tokens, "most_length": config.most_length}
        self.scheduler = Scheduler(self.pool, most_sequences=config.most_sequences, **limits)
        self.keys, self.values = make_cache(decoder, self.pool)
        rows = config.most_sequences if drafter is None else drafter.rows(config.most_sequences)
        arguments = rows, self.scheduler.most_length, config.graphs
        self.forward = forward(decoder, self.keys, self.values, *arguments)

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

    def finish(self, sequence: Sequence, reason: str, length: int | None = None) -> None:
        """End a request, e.g. at a stop text; of one that just ended for its length the reason is put right.

        Args:
            sequence: of the request.
            reason: `stop`, `length` or `cancelled`.
            length: output tokens that count, if it is to end before the last of those that came in one step.
        """
        if not sequence.finish_reason:
            self.scheduler.remove(sequence)
            if self.drafter is not None:
                self.drafter.forget(sequence)
        sequence.finish_reason = reason
        if length is not None:
            del sequence.output[length:], sequence.logprobs[length:]

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One pass through the decoder; the sequences that got tokens, each as many as its `fresh` says."""
        shares = self.scheduler.next()
        if not shares:
            return []
        if self.drafter is not None:
            shares = self.drafter.propose(shares, self.scheduler)
        batch = make_batch(shares, self.pool.size, self.decoder.embed.device)
        logits = self.forward(batch)
        grown = [share for share in shares if share.wanted]
        choices = choose(logits, [share.sequence for share in grown]) if grown else []
        for share in shares:
            if not share.wanted:
                self.scheduler.done(share)
        for share, chosen in zip(grown, choices, strict=True):
            self._append(share, chosen)
        return [share.sequence for share in grown]

    def run(self) -> Iterator[list[Sequence]]:
        """Steps until nothing is left to do."""
        while self.busy:
            yield self.step()

    @property
    def cache_bytes(self) -> int:
        """Of all keys and values, those of a draft model too."""
        tensors = [*self.keys, *self.values]
        if self.drafter is not None:
            tensors += [*self.drafter.keys, *self.drafter.values]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def speculation(self) -> Tally | None:
        """What came of drafting so far; None without a draft model."""
        return None if self.drafter is None else self.drafter.tally

    def _append(self, share: Share, chosen: Choices) -> None:
        """Take the tokens of one sequence, up to one that ends it."""
        sequence = share.sequence
        self.scheduler.done(share, share.wanted - len(chosen))
        if self.drafter is not None and sequence.draft:
            self.drafter.settle(sequence, len(chosen) - 1)
            sequence.draft.clear()
            sequence.odds.clear()
        sequence.fresh = 0
        for token, logprob in chosen:
            sequence.output.append(token)
            sequence.fresh += 1
            if logprob is not None:
                sequence.logprobs.append(logprob)
            if reason := self._reason(sequence, token):
                return self.finish(sequence, reason)

    def _reason(self, sequence: Sequence, token: int) -> str:
        params = sequence.params
        if token in params.stop_token_ids or (token in self.eos and not params.ignore_eos):
            return "stop"
        full = len(sequence.output) >= params.max_tokens or sequence.length >= self.scheduler.most_length
        return "length" if full else ""
