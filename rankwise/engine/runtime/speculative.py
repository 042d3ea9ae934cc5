"""A draft model guesses the next tokens of decoding sequences; the model itself then verifies them in one pass.

Speculative decoding (Leviathan et al., 2211.17192). Here the draft is usually the model's own compressed checkpoint.
It has blocks and a KV cache of its own, in which each sequence has a shadow: the same tokens, computed as far as the
draft is. A shadow only ever helps: without room for it, or behind a long prompt that it has not read yet, its sequence
decodes as without a draft. `acceptance` decides what stays.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from rankwise.config import check_count
from rankwise.engine.runtime.batch import make_batch
from rankwise.engine.runtime.blocks import BlockPool
from rankwise.engine.runtime.decoder import Decoder
from rankwise.engine.runtime.graphs import forward
from rankwise.engine.runtime.memory import make_cache
from rankwise.engine.runtime.sampler import filters, peek, penalise, pick, uniforms
from rankwise.engine.runtime.scheduler import Scheduler, Share
from rankwise.engine.runtime.sequence import Sequence
from rankwise.kernels.sampling import draw, probabilities


@dataclass
class Tally:
    """What came of drafting so far.

    Args:
        drafted: tokens that were verified.
        accepted: of them, those that stayed.
        checks: verified drafts; each gave one token more than stayed.
    """

    drafted: int = 0
    accepted: int = 0
    checks: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that stayed; 0 before the first."""
        return self.accepted / max(1, self.drafted)

    @property
    def tokens_per_check(self) -> float:
        """Tokens that a sequence gained by a pass of the model in which a draft of it was verified."""
        return (self.accepted + self.checks) / max(1, self.checks)


class Drafter:
    """A draft model with its cache.

    Args:
        decoder: of the draft model; its vocabulary is that of the model.
        pool: blocks of its cache, of any size and number.
        tokens: to draft for a sequence in a step.
        most_tokens: of one pass; a prompt that is longer is read in several steps.
        most_sequences: while more than so many decode, nothing is drafted: together they use the machine as it is.
        most_length: of a sequence.
        graphs: on a GPU, passes of few tokens run as captured CUDA graphs.

    Raises:
        RankwiseError: a count below 1.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: BlockPool,
        *,
        tokens: int = 4,
        most_tokens: int = 1024,
        most_sequences: int = 16,
        most_length: int = 2048,
        graphs: bool = True,
    ) -> None:
        check_count("draft_tokens", tokens, 1)
        check_count("draft_sequences", most_sequences, 1)
        self.decoder, self.pool, self.tokens = decoder, pool, tokens
        self.most_tokens, self.most_sequences = most_tokens, most_sequences
        self.keys, self.values = make_cache(decoder, pool)
        rows = 2 * most_sequences  # the last token of a draft that stayed has not been read, nor the one after it
        self.forward = forward(decoder, self.keys, self.values, rows, most_length, graphs)
        self.shadows: dict[Sequence, Sequence] = {}
        self.tally = Tally()

    def rows(self, sequences: int) -> int:
        """Tokens of a step of the model in which so many sequences decode at most, drafts and all."""
        return max(sequences, min(sequences, self.most_sequences) * (1 + self.tokens))

    @torch.inference_mode()
    def propose(self, shares: list[Share], scheduler: Scheduler) -> list[Share]:
        """Draft for the sequences of a step that decode; the step's shares with the drafts, in a batch's order."""
        for sequence in set(self.shadows) - set(scheduler.running):
            self.forget(sequence)  # it lost its place
        asked = self._asked(shares, scheduler)
        ready, logits = self._catch_up(list(asked))
        counts = {
            shadow: self._room(shadow, scheduler.stretch(sequence, asked[sequence])) for sequence, shadow in ready
        }
        self._draft([shadow for _, shadow in ready], counts, logits)
        longer = [Share(share.sequence, share.count + len(share.sequence.draft)) for share in shares]
        return sorted(longer, key=lambda share: share.count > 1)

    def settle(self, sequence: Sequence, accepted: int) -> None:
        """Take note of a verdict, and go back to where the draft was right."""
        self.tally.checks += 1
        self.tally.drafted += len(sequence.draft)
        self.tally.accepted += accepted
        shadow = self.shadows[sequence]
        shadow.computed = min(shadow.computed, sequence.computed)  # what lies beyond is written over

    def forget(self, sequence: Sequence) -> None:
        """Free what the draft holds of a sequence; harmless if that is nothing."""
        shadow = self.shadows.pop(sequence, None)
        if shadow is not None:
            shadow.let_go(self.pool)

    def _asked(self, shares: list[Share], scheduler: Scheduler) -> dict[Sequence, int]:
        """How many tokens to draft for whom: no more than a request may still get, nor than the step has room for."""
        decoding = [share.sequence for share in shares if share.count == share.wanted]
        budget, found = scheduler.most_tokens - sum(share.count for share in shares), {}
        for sequence in decoding if len(decoding) <= self.most_sequences else ():
            left = sequence.params.max_tokens - len(sequence.output)
            count = min(self.tokens, left - 1, scheduler.most_length - sequence.length - 1, budget)
            if count > 0:
                found[sequence] = count
                budget -= count
        return found

    def _catch_up(self, sequences: list[Sequence]) -> tuple[list[tuple[Sequence, Sequence]], torch.Tensor | None]:
        """Let the draft read what it has not read yet; those that it is through with, and the logits that follow."""
        pairs = [(sequence, self._shadow(sequence)) for sequence in sequences]
        budget, reading = self.most_tokens, []
        for sequence, shadow in sorted(pairs, key=lambda pair: pair[1].left):
            count = min(shadow.left, budget)
            if count and shadow.missing(self.pool, count) <= self.pool.available():
                shadow.hold(self.pool, count)
                reading.append((sequence, Share(shadow, count)))
                budget -= count
        reading.sort(key=lambda pair: pair[1].count > 1)
        ready = [(sequence, share.sequence) for sequence, share in reading if share.wanted]
        logits = self._logits([share for _, share in reading]) if reading else None
        for _, share in reading:
            share.sequence.advance(self.pool, share.count)
        return ready, logits

    def _shadow(self, sequence: Sequence) -> Sequence:
        """The sequence as the draft sees it: the same tokens and random numbers, blocks of its own."""
        if sequence not in self.shadows:
            shadow = Sequence(sequence.prompt, sequence.params, sequence.generator)
            shadow.output, shadow.draft, shadow.odds = sequence.output, sequence.draft, sequence.odds
            shadow.find(self.pool)
            self.shadows[sequence] = shadow
        return self.shadows[sequence]

    def _room(self, shadow: Sequence, count: int) -> int:
        """Hold blocks for a draft; its last token is not computed by the draft model."""
        room = (len(shadow.blocks) + self.pool.available()) * self.pool.size - shadow.length
        count = min(count, room + 1)
        shadow.hold(self.pool, max(0, count - 1))
        return count

    def _draft(self, shadows: list[Sequence], counts: dict[Sequence, int], logits: torch.Tensor | None) -> None:
        rows = [at for at, shadow in enumerate(shadows) if counts[shadow]]
        live = [shadows[at] for at in rows]
        if logits is not None and len(live) < len(shadows):
            logits = logits[rows]
        while live and logits is not None:
            guess(logits, live)
            rows = [at for at, shadow in enumerate(live) if len(shadow.draft) < counts[shadow]]
            live = [live[at] for at in rows]
            logits = self._logits([Share(shadow, 1) for shadow in live]) if live else None
            for shadow in live:
                shadow.computed += 1

    def _logits(self, shares: list[Share]) -> torch.Tensor:
        return self.forward(make_batch(shares, self.pool.size, self.decoder.embed.device))


def guess(logits: torch.Tensor, shadows: Many[Sequence]) -> None:
    """Add a token to each draft: for a request whose tokens are fixed as it would pick it itself, else by lot.

    Args:
        logits: `[N, vocabulary]` of the draft model; in fp32 they may be changed.
        shadows: in the order of the rows.
    """
    logits = penalise(logits, shadows, [len(shadow.draft) for shadow in shadows])
    for fixed in (True, False):
        rows = [at for at, shadow in enumerate(shadows) if shadow.params.fixed is fixed]
        if not rows:
            continue
        some, live = logits[rows], [shadows[at] for at in rows]
        params = [shadow.params for shadow in live]
        if fixed:
            numbers = [peek(s, len(s.draft) + 1)[-1] if s.params.temperature else 0.0 for s in live]
            tokens = pick(some, params, numbers)
        else:
            q = probabilities(some, **filters(params, some.device))
            tokens = draw(q, q.new_tensor([uniforms(shadow, 1)[0] for shadow in live]))
            for shadow, odds in zip(live, q, strict=True):
                shadow.odds.append(odds)
        for shadow, token in zip(live, tokens.tolist(), strict=True):
            shadow.draft.append(token)
