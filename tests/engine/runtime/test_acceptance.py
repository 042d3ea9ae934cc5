"""Verified drafts leave the distribution as it is; the rejection rule keeps as many as can be kept."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from rankwise.engine.runtime import engine as engines
from rankwise.engine.runtime.acceptance import choose
from rankwise.engine.runtime.blocks import BlockPool
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.loader import convert
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.sequence import Sequence
from rankwise.engine.runtime.speculative import Drafter, guess
from rankwise.kernels.sampling import probabilities

PROMPT = [17]
CASES: list[tuple[float, dict[str, Any]]] = [  # noise in the draft's weights, as a share of theirs
    (0.1, {"temperature": 0.7, "top_k": 4}),
    (0.5, {"temperature": 0.7, "top_k": 4}),
    (0.1, {"temperature": 1.5, "top_k": 6, "top_p": 0.8}),
    (0.1, {"temperature": 0.1, "min_p": 0.5}),
    (0.1, {"temperature": 0.8, "top_k": 4, "repetition_penalty": 1.5, "presence_penalty": 1.0}),
]


def processed(model: Any, tokens: list[int], params: SamplingParams) -> torch.Tensor:
    """The distribution after some tokens, by transformers and plain arithmetic in fp64."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1].double()
    for token in set(tokens):
        logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    for token in set(tokens[len(PROMPT) :]):
        logits[token] -= params.presence_penalty
    p = (logits / params.temperature).softmax(-1)
    values, order = p.sort(descending=True)
    if params.top_k:
        values[params.top_k :] = 0
    values = values / values.sum()
    values[values.cumsum(0) - values >= params.top_p] = 0
    values[values < params.min_p * values[0]] = 0
    return torch.zeros_like(p).scatter(0, order, values / values.sum())


def joint(model: Any, params: SamplingParams, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every output of a length."""
    found = {(): 1.0}
    for _ in range(length):
        found = {
            (*tokens, token): so_far * float(p[token])
            for tokens, so_far in found.items()
            for p in [processed(model, PROMPT + list(tokens), params)]
            for token in p.nonzero()[:, 0].tolist()
        }
    return found


@pytest.mark.parametrize(("noise", "options"), CASES, ids=str)
def test_outputs_follow_the_models_distribution(
    tiny: Callable[..., Any], noise: float, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two drafted tokens and the one after them, as one outcome."""
    numbers, draws, length = count(), 3000, 3
    monkeypatch.setattr(engines.secrets, "randbits", lambda _: next(numbers))  # the same every time, and no seed
    params, guesser = SamplingParams(max_tokens=length, ignore_eos=True, **options), tiny("llama")
    torch.manual_seed(1)
    for parameter in guesser.parameters():
        parameter.add_(noise * parameter.std(correction=0) * torch.randn_like(parameter))
    expected = joint(tiny("llama"), params, length)
    drafter = Drafter(convert(guesser, 64), BlockPool(2000, 4), tokens=4, most_tokens=4000, most_sequences=1000)
    config = EngineConfig(blocks=2000, block_size=4, most_sequences=1000, most_tokens=4000, most_length=64)
    running = Engine(convert(tiny("llama"), 64), config, drafter=drafter)
    sequences = [running.add(PROMPT, params) for _ in range(draws)]
    for _ in running.run():
        pass
    counts = dict.fromkeys(expected, 0)
    for sequence in sequences:
        counts[tuple(sequence.output)] += 1
    likely = [outcome for outcome, p in expected.items() if p * draws >= 5]
    observed, wanted = [counts[o] for o in likely], [expected[o] * draws for o in likely]
    if len(likely) < len(expected):
        observed, wanted = [*observed, draws - sum(observed)], [*wanted, draws - sum(wanted)]
    assert len(observed) > 5
    assert chisquare(observed, wanted).pvalue > 1e-3
    tally = running.speculation
    assert tally is not None
    assert tally.drafted >= 2 * draws
    assert 0 < tally.accepted < tally.drafted


def one(params: SamplingParams, seed: int = 0) -> Sequence:
    return Sequence([3], params, torch.Generator().manual_seed(seed))


def test_as_many_are_kept_as_the_distributions_have_in_common() -> None:
    """The share of drafts that stay is `Σ min(p, q)`."""
    torch.manual_seed(0)
    p, q = (torch.randn(1, 12) for _ in range(2))
    draws, params = 4000, SamplingParams(temperature=0.9, top_k=9)
    sequences = [one(params, seed) for seed in range(draws)]
    guess(q.expand(draws, -1).clone(), sequences)
    found = choose(p.repeat_interleave(2, 0).repeat(draws, 1), sequences)
    kept = sum(len(choices) == 2 for choices in found) / draws
    options = {"temperature": torch.tensor([0.9]), "top_k": torch.tensor([9])}
    common = float(torch.minimum(probabilities(p, **options), probabilities(q, **options)).sum())
    assert kept == pytest.approx(common, abs=3 * (common * (1 - common) / draws) ** 0.5)


def test_a_draft_by_the_same_distribution_always_stays() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 40)
    for seed in range(200):
        sequence = one(SamplingParams(temperature=1.1, top_p=0.95), seed)
        for row in range(4):
            guess(logits[row : row + 1].clone(), [sequence])
        [choices] = choose(logits.clone(), [sequence])
        assert [token for token, _ in choices][:4] == sequence.draft
        assert len(choices) == 5


def test_rows_of_all_kinds_side_by_side() -> None:
    """Plain, greedy, seeded and free ones, with drafts of different lengths: each as if it were alone."""
    torch.manual_seed(0)
    kinds = [
        (SamplingParams(temperature=0, logprobs=1), 2),
        (SamplingParams(temperature=1.0), 0),
        (SamplingParams(temperature=0.8, seed=1), 3),
        (SamplingParams(temperature=0.9, top_k=5, logprobs=2), 1),
        (SamplingParams(temperature=0, frequency_penalty=1.0), 0),
        (SamplingParams(temperature=1.3, presence_penalty=1.5), 4),
    ]
    theirs, ours = torch.randn(20, 30), torch.randn(20, 30) / 3

    def made() -> list[tuple[Sequence, torch.Tensor]]:
        found, row = [], 0
        for at, (params, drafted) in enumerate(kinds):
            sequence = one(params, at)
            for step in range(drafted):
                guess((theirs + ours)[row + step][None].clone(), [sequence])
            found.append((sequence, theirs[row : row + drafted + 1].clone()))
            row += drafted + 1
        return found

    together = made()
    whole = choose(torch.cat([rows for _, rows in together]), [sequence for sequence, _ in together])
    assert whole == [choose(rows, [sequence])[0] for sequence, rows in made()]
    assert [len(choices) <= drafted + 1 for choices, (_, drafted) in zip(whole, kinds, strict=True)] == [True] * 6


@pytest.mark.parametrize("penalty", [{"presence_penalty": 0.06}, {"frequency_penalty": 0.01}])
def test_a_small_penalty_counts_in_bf16(penalty: dict[str, float]) -> None:
    """Logits near 20 lie 0.125 apart there; taken from one of two that are alike, less than that decides."""
    logits = torch.full((2, 8), 20.0, dtype=torch.bfloat16)
    first = Sequence([1], SamplingParams(temperature=0, **penalty), output=[0, 0, 0])
    other = Sequence([1], SamplingParams(temperature=0), output=[0])
    [[(token, _)], [(unpenalised, _)]] = choose(logits, [first, other])
    assert (token, unpenalised) == (1, 0)
