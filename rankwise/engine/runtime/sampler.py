"""From logits to the next token of each sequence: penalties, random numbers of its own, log-probabilities."""

from collections import Counter
from collections.abc import Sequence as Many

import torch

from rankwise.engine.runtime.params import Logprob, SamplingParams
from rankwise.engine.runtime.sequence import Sequence
from rankwise.kernels.sampling import logsumexp_argmax, sample


def pick(logits: torch.Tensor, params: Many[SamplingParams], uniform: Many[float]) -> torch.Tensor:
    """One token a row, `[N]` int64.

    Args:
        logits: `[N, vocabulary]`, penalties applied.
        params: of each row.
        uniform: a random number in [0, 1) a row; not looked at where every temperature is 0.
    """
    if all(p.temperature == 0 for p in params):
        return logits.max(-1).indices  # the same as argmax, which is several times slower in bf16 on a CPU
    numbers = torch.tensor(uniform, dtype=torch.float32, device=logits.device)
    return sample(logits, numbers, **filters(params, logits.device))


def filters(params: Many[SamplingParams], device: torch.device) -> dict[str, torch.Tensor | None]:
    """The columns that `kernels.sampling.sample` takes; None where no row asks for anything."""

    def column(name: str, neutral: float, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        values = [getattr(p, name) for p in params]
        return None if all(v == neutral for v in values) else torch.tensor(values, dtype=dtype, device=device)

    return {
        "temperature": column("temperature", 1.0),
        "top_k": column("top_k", 0, torch.int64),
        "top_p": column("top_p", 1.0),
        "min_p": column("min_p", 0.0),
    }


def uniforms(sequence: Sequence, count: int) -> list[float]:
    """The next random numbers of a sequence, used up."""
    return [float(torch.rand((), generator=sequence.generator)) for _ in range(count)]


def peek(sequence: Sequence, count: int) -> list[float]:
    """The same numbers, which come again."""
    state = sequence.generator.get_state()
    found = uniforms(sequence, count)
    sequence.generator.set_state(state)
    return found


def penalise(logits: torch.Tensor, sequences: Many[Sequence], ahead: Many[int]) -> torch.Tensor:
    """Logits with each row's penalties.

    Args:
        logits: `[N, vocabulary]`.
        sequences: of each row.
        ahead: so many tokens of its sequence's draft come before a row; they count as output.

    Returns:
        `logits` as they are where nothing is asked for, else changed, and in fp32: near 20 numbers in bf16 lie 0.125
        apart, and a smaller penalty would be none.
    """
    if any(sequence.params.penalised for sequence in sequences):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    for row, (sequence, drafted) in enumerate(zip(sequences, ahead, strict=True)):
        p = sequence.params
        if not p.penalised:
            continue
        output = sequence.output + sequence.draft[:drafted]
        if p.repetition_penalty != 1:
            seen = torch.tensor(sorted({*sequence.prompt, *output}), device=logits.device)
            values = logits[row, seen]
            logits[row, seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        counts = Counter(output)
        if counts and (p.presence_penalty or p.frequency_penalty):
            tokens = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
            logits[row, tokens] -= p.presence_penalty + p.frequency_penalty * times
    return logits


def log_probabilities(logits: torch.Tensor, tokens: Many[int], wanted: Many[int | None]) -> list[Logprob | None]:
    """Of the distribution before temperature and filters.

    Args:
        logits: `[N, vocabulary]`, penalties applied.
        tokens: that were taken.
        wanted: so many likeliest ones beside it; None: nothing.
    """
    most = max((count for count in wanted if count is not None), default=None)
    if most is None:
        return [None] * len(wanted)
    total, _ = logsumexp_argmax(logits)
    taken = torch.tensor(tokens, device=logits.device)
    chosen = (logits.gather(-1, taken[:, None])[:, 0].to(total.dtype) - total).tolist()
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
