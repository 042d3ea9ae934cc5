"""Perplexity equals the model's own loss, put together by hand."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rankwise.errors import RankwiseError
from rankwise.evaluate import perplexity


def windows(count: int, length: int) -> torch.Tensor:
    return torch.randint(2, 512, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("count", "length"), [(1, 2), (1, 20), (5, 13)])
def test_equals_the_models_own_loss(count: int, length: int, family: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(family), windows(count, length)
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in ids]
    assert perplexity(model, ids) == pytest.approx(math.exp(sum(losses) / count), rel=1e-5)


def test_logits_are_reduced_in_fp32(tiny: Callable[..., Any]) -> None:
    model, ids = tiny("llama", torch.bfloat16), windows(3, 30)
    total = 0.0
    for window in ids:
        scores = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        total -= sum(float(scores[t, window[t + 1]]) for t in range(29))
    assert perplexity(model, ids) == pytest.approx(math.exp(total / (3 * 29)), rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(tiny: Callable[..., Any]) -> None:
    model = tiny("qwen2")
    model.lm_head.weight.zero_()
    assert perplexity(model, windows(2, 10)) == pytest.approx(512, rel=1e-5)


def test_each_window_is_a_context_of_its_own(tiny: Callable[..., Any]) -> None:
    model, ids = tiny("llama"), windows(4, 16)
    alone = [math.log(perplexity(model, ids[i : i + 1])) for i in range(4)]
    assert math.log(perplexity(model, ids)) == pytest.approx(sum(alone) / 4, rel=1e-6)
    assert perplexity(model, ids.flip(0)) == pytest.approx(perplexity(model, ids), rel=1e-6)


def test_models_still_in_training_leave_no_graph(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    expected = perplexity(model, windows(2, 10))
    assert perplexity(model.requires_grad_(True), windows(2, 10)) == expected
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_windows(tiny: Callable[..., Any]) -> None:
    seen: list[Any] = []

    @contextmanager
    def track(name: str, total: int) -> Iterator[Callable[[], None]]:
        seen.append((name, total))
        yield lambda: seen.append("window")

    perplexity(tiny("llama"), windows(3, 8), track=track)
    assert seen == [("perplexity", 3), "window", "window", "window"]


def test_a_loss_beyond_what_exp_can_say_is_no_crash(tiny: Callable[..., Any]) -> None:
    model = tiny("qwen2")
    model.lm_head.weight.mul_(1e5)
    try:
        value = perplexity(model, windows(2, 10))
    except RankwiseError:
        return
    assert value == math.inf


def test_logits_that_are_no_numbers_are_no_infinite_perplexity(tiny: Callable[..., Any]) -> None:
    model = tiny("qwen2")
    model.lm_head.weight[7, 7] = math.nan
    try:
        value = perplexity(model, windows(2, 10))
    except RankwiseError:
        return
    assert math.isnan(value)
