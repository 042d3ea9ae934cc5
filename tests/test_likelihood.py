"""Contexts that are run once give the answers of lm-eval's own class, which runs them once a choice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from rankwise.errors import RankwiseError
from rankwise.likelihood import SharedContext

LONG = "The parameter list of a function is written between parentheses, and a comma stands between two names."
PAIRS = [
    (LONG, " It"),
    ("Names", " refer to objects."),
    (LONG, " A default value may follow each name."),
    ("Names", " refer"),
    ("An expression", " is evaluated from left to right, and so is its right side."),
    ("Names", " refer to objects."),
    ("", "Every object has a type."),
    (LONG, " Nothing else is allowed."),
    ("An expression ", "is evaluated"),
]


def ask(lm: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, 0, metadata=("made", 0, 1)) for pair in pairs]
    return list(lm.loglikelihood(requests, disable_tqdm=True))


def by_hand(model: Any, tokenizer: Any, context: str, ending: str) -> tuple[float, bool]:
    """Sum of the log-probabilities of the ending's tokens, one by one, and whether each was the likeliest."""
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + ending)["input_ids"]
    scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(start - 1, len(ids) - 1)
    return (
        sum(float(scores[i, ids[i + 1]]) for i in places),
        all(int(scores[i].argmax()) == ids[i + 1] for i in places),
    )


def same(first: list[tuple[float, bool]], second: list[tuple[float, bool]]) -> bool:
    values = [pytest.approx(value, abs=2e-4) for value, _ in second]
    return [value for value, _ in first] == values and [greedy for _, greedy in first] == [g for _, g in second]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_are_those_of_lm_eval(batch_size: int, family: str, tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny(family)
    expected = ask(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), PAIRS)
    assert same(ask(SharedContext(model, tokenizer, batch_size=batch_size), PAIRS), expected)


def test_answers_are_sums_of_log_probabilities(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama")
    pairs = [pair for pair in PAIRS if pair[0] and not pair[0].endswith(" ")]
    expected = [by_hand(model, tokenizer, *pair) for pair in pairs]
    assert same(ask(SharedContext(model, tokenizer, batch_size=4), pairs), expected)


def test_the_likeliest_ending_is_told_from_others(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama")
    ids = tokenizer("Names")["input_ids"]
    for _ in range(3):
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    context = ids[: len(tokenizer("Names")["input_ids"])]
    lm = SharedContext(model, tokenizer, batch_size=4)
    ending = ids[len(context) :]
    other = [*ending[:-1], (ending[-1] + 1) % 500]
    answers = lm._loglikelihood_tokens([(None, context, ending), (None, context, other), (None, context, ending[:1])])
    assert [greedy for _, greedy in answers] == [True, False, True]


def test_a_context_too_long_loses_its_start(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama")  # 128 positions
    pairs = [(LONG * 5, " It"), (LONG * 5, " A default value may follow."), ("Names", " refer"), (LONG * 5, " Nothing")]
    lm = SharedContext(model, tokenizer, batch_size=4)
    assert same(ask(lm, pairs), ask(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), pairs))
    assert dict(lm.truncated) == {"made": 3}


@pytest.mark.parametrize("length", [0, 129])
def test_an_ending_must_fit(length: int, tiny: Callable[..., Any], tokenizer: Any) -> None:
    lm = SharedContext(tiny("llama"), tokenizer, batch_size=4)
    with pytest.raises(RankwiseError, match=f"a choice of {length} tokens; 1 to 128 are needed"):
        lm._loglikelihood_tokens([(None, [5], [7] * length)])
    assert len(lm._loglikelihood_tokens([(None, [5], [7] * 128)])) == 1


def test_log_softmax_is_not_rounded_to_the_models_dtype(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama", torch.bfloat16)
    pairs = [("Names", " refer"), ("Names", " objects"), ("Names", " to")]
    answers = ask(SharedContext(model, tokenizer, batch_size=4), pairs)
    assert answers == [(pytest.approx(by_hand(model, tokenizer, *pair)[0], abs=0.05), False) for pair in pairs]
    assert any(value != float(torch.tensor(value).bfloat16()) for value, _ in answers)


def test_progress_counts_choices(tiny: Callable[..., Any], tokenizer: Any) -> None:
    seen: list[Any] = []

    @contextmanager
    def track(name: str, total: int) -> Iterator[Callable[[], None]]:
        seen.append((name, total))
        yield lambda: seen.append("choice")

    ask(SharedContext(tiny("llama"), tokenizer, batch_size=2, track=track), PAIRS)
    assert seen == [("choices", len(PAIRS)), *["choice"] * len(PAIRS)]
