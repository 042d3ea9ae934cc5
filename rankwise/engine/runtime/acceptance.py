"""Which drafted tokens stay, and the token after them; without a draft simply the next token of each sequence.

The output is distributed as if the model had drawn every token itself. Two rules keep it so:

* **Match**, for requests whose tokens are fixed (temperature 0, or a seed): at every place the model picks its own
  token with the request's own random number, and a drafted token stays where it is the same one. So the tokens are
  those of the model without a draft, whatever was drafted.
* **Rejection**, for all others (Leviathan et al., 2211.17192; Chen et al., 2302.01318): a token that was drawn from `q`
  stays with probability `min(1, p / q)`; in place of the first one that goes another is drawn from `(p - q)+`. Where
  all stay, one more is drawn from `p`. No rule that keeps the distribution `p` keeps more of them at a place.

`p` and `q` are what is drawn from: penalties, temperature, top-k, top-p and min-p are applied to both.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from itertools import accumulate, pairwise

import torch

from rankwise.engine.runtime.params import Logprob
from rankwise.engine.runtime.sampler import filters, log_probabilities, peek, penalise, pick, uniforms
from rankwise.engine.runtime.sequence import Sequence
from rankwise.kernels.sampling import draw, probabilities

Choices = list[tuple[int, Logprob | None]]
Rule = Callable[[torch.Tensor, list[Sequence]], list[list[int]]]


def choose(logits: torch.Tensor, sequences: Many[Sequence]) -> list[Choices]:
    """The next tokens of each sequence, one at least, and what is known of each.

    Args:
        logits: of each sequence `1 + len(draft)` rows, one after another; in fp32 they may be changed.
        sequences: with their drafts.

    Returns:
        For each: the drafted tokens that stay, and the one that follows them.
    """
    owners = [sequence for sequence in sequences for _ in range(len(sequence.draft) + 1)]
    logits = penalise(logits, owners, [ahead for sequence in sequences for ahead in range(len(sequence.draft) + 1)])
    bounds = list(_bounds(sequences))
    tokens: list[list[int]] = [[] for _ in sequences]
    rules: tuple[Rule, Rule] = match, reject
    for rule in rules:
        places = [at for at, sequence in enumerate(sequences) if bool(sequence.odds) is (rule is reject)]
        if places:
            rows = [row for at in places for row in range(*bounds[at])]
            some = logits if len(rows) == len(logits) else logits[rows]
            for at, found in zip(places, rule(some, [sequences[at] for at in places]), strict=True):
                tokens[at] = found
    kept = [start + step for (start, _), found in zip(bounds, tokens, strict=True) for step in range(len(found))]
    wanted = [owners[row].params.logprobs for row in kept]
    some = logits if len(kept) == len(logits) or not any(w is not None for w in wanted) else logits[kept]
    known = iter(log_probabilities(some, [token for found in tokens for token in found], wanted))
    return [[(token, next(known)) for token in found] for found in tokens]


def match(logits: torch.Tensor, sequences: list[Sequence]) -> list[list[int]]:
    """Tokens by the first rule; plain decoding where there is no draft."""
    params = [sequence.params for sequence in sequences for _ in range(len(sequence.draft) + 1)]
    numbers: list[float] = []
    if any(p.temperature for p in params):
        for sequence in sequences:
            numbers += peek(sequence, len(sequence.draft) + 1) if sequence.draft else uniforms(sequence, 1)
    picked, found = pick(logits, params, numbers).tolist(), []
    for (start, end), sequence in zip(_bounds(sequences), sequences, strict=True):
        own, draft = picked[start:end], sequence.draft
        stay = _leading([one == other for one, other in zip(own, draft, strict=False)])
        if draft and sequence.params.temperature:
            uniforms(sequence, stay + 1)
        found.append(own[: stay + 1])
    return found


def reject(logits: torch.Tensor, sequences: list[Sequence]) -> list[list[int]]:
    """Tokens by the second rule; every sequence has a draft and the odds that it was drawn by."""
    params = [sequence.params for sequence in sequences for _ in range(len(sequence.draft) + 1)]
    p, bounds = probabilities(logits, **filters(params, logits.device)), list(_bounds(sequences))
    q = torch.zeros_like(p)  # after the last drafted token nothing was proposed: what is left of p is p
    rows = [row for start, end in bounds for row in range(start, end - 1)]
    q[rows] = torch.stack([odds for sequence in sequences for odds in sequence.odds]).to(p.dtype)
    draft = [token for sequence in sequences for token in sequence.draft]
    numbers = p.new_tensor([u for sequence in sequences for u in uniforms(sequence, len(sequence.draft))])
    verdicts = iter((numbers * q[rows, draft] < p[rows, draft]).tolist())
    stays = [_leading([next(verdicts) for _ in sequence.draft]) for sequence in sequences]
    ends = [start + stay for (start, _), stay in zip(bounds, stays, strict=True)]
    rest = (p[ends] - q[ends]).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[ends])  # p and q alike but for rounding
    last = draw(rest, rest.new_tensor([uniforms(sequence, 1)[0] for sequence in sequences])).tolist()
    return [[*s.draft[:stay], token] for s, stay, token in zip(sequences, stays, last, strict=True)]


def _bounds(sequences: Many[Sequence]) -> Iterator[tuple[int, int]]:
    """First row of each sequence, and the one after its last."""
    return pairwise(accumulate((len(sequence.draft) + 1 for sequence in sequences), initial=0))


def _leading(verdicts: list[bool]) -> int:
    """How many are true before the first that is not."""
    return verdicts.index(False) if False in verdicts else len(verdicts)
