"""From logits to the next token of each sequence: penalties, random numbers of its own, log-probabilities."""

from collections import Counter
from collections.abc import Sequence as Many

import torch

from rankwise.engine.runtime.params import Logprob
from rankwise.engine.runtime.sequence import Sequence
from rankwise.kernels.sampling import logsumexp_argmax, sample


def choose(logits: torch.Tensor, sequences: Many[Sequence]) -> tuple[list[int], list[Logprob | None]]:
    """One token for each sequence, and what is known of it.

    Args:
        logits: `[N, vocabulary]`; changed where a penalty asks for it.
        sequences: in the order of the rows.
    """
    _penalise(logits, sequences)
    params = [sequence.params for sequence in sequences]
    if all(p.temperature == 0 for p in params):
        tokens = logits.argmax(-1)
    else:
        device = logits.device
        uniform = [float(torch.rand((), generator=sequence.generator)) for sequence in sequences]

        def column(name: str, neutral: float, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
            values = [getattr(p, name) for p in params]
            return None if all(v == neutral for v in values) else torch.tensor(values, dtype=dtype, device=device)

        tokens = sample(
            logits,
            torch.tensor(uniform, dtype=torch.float32, device=device),
            column("temperature", 1.0),
            column("top_k", 0, torch.int64),
            column("top_p", 1.0),
            column("min_p", 0.0),
        )
    wanted = [p.logprobs for p in params]
    return tokens.tolist(), _logprobs(logits, tokens, wanted)


def _penalise(logits: torch.Tensor, sequences: Many[Sequence]) -> None:
    for row, sequence in enumerate(sequences):
        p = sequence.params
        if not p.penalised:
            continue
        if p.repetition_penalty != 1:
            seen = torch.tensor(sorted({*sequence.prompt, *sequence.output}), device=logits.device)
            values = logits[row, seen]
            logits[row, seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        counts = Counter(sequence.output)
        if counts and (p.presence_penalty or p.frequency_penalty):
            tokens = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
            logits[row, tokens] -= p.presence_penalty + p.frequency_penalty * times


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, wanted: Many[int | None]) -> list[Logprob | None]:
    """Of the distribution before temperature and filters."""
    most = max((count for count in wanted if count is not None), default=None)
    if most is None:
        return [None] * len(wanted)
    total, _ = logsumexp_argmax(logits)
    chosen = (logits.gather(-1, tokens[:, None])[:, 0].to(total.dtype) - total).tolist()
    values, order = logits.topk(max(1, most))
    above = (values.to(total.dtype) - total[:, None]).tolist()
    found: list[Logprob | None] = []
    for row, count in enumerate(wanted):
        if count is None:
            found.append(None)
            continue
        top = dict(zip(order[row, :count].tolist(), above[row][:count], strict=True))
        found.append(Logprob(chosen[row], top))
    return found
