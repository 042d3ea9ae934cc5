"""Terms of the losses against brute force and against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.alloc import objectives
from rankwise.alloc.curve import Curve


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 50), st.integers(2, 50), st.booleans(), st.integers(0, 99))
def test_capacity_against_brute_force(m: int, n: int, pivot: bool, seed: int) -> None:
    energy = np.sort(np.random.default_rng(seed).exponential(size=min(m, n)))[::-1] ** 2
    table = objectives.capacity_table(energy, Curve(m, n, pivot))
    for step in range(1, 100):
        budget = step * m * n / 100
        cost = [k * (m + n - (k if pivot else 0)) for k in range(min(m, n) + 1)]
        rank = max(k for k, parameters in enumerate(cost) if parameters <= budget + 1e-6)
        lost = sum(energy[rank:])
        assert table[step - 1] == pytest.approx(1 - math.sqrt(lost / sum(energy)), abs=1e-9)


def test_capacity_is_looked_up_at_the_nearest_ratio() -> None:
    table = np.arange(1, 100) / 100
    for ratio, found in ((0.5, 0.5), (0.504, 0.5), (0.506, 0.51), (0.0, 0.01), (0.999, 0.99), (1.3, 0.99)):
        assert objectives.capacity(table, ratio) == found


@pytest.mark.parametrize("energy", [np.zeros(4), np.full(4, np.inf)], ids=["zero", "unseen"])
def test_capacity_of_unknown_worth_calls_nothing_a_bad_deal(energy: np.ndarray) -> None:
    assert (objectives.capacity_table(energy, Curve(4, 6, False)) == 1).all()


VALUES = (0.5, 0.9, 0.4, 1.2)


def test_guidance_by_hand() -> None:
    """Of four modules two have bad deals: (1 - 0.5 + 1 - 0.9) / 4; a dense one has no distance left to go."""
    shares = {name: torch.tensor(value, requires_grad=True) for name, value in zip("abcd", VALUES, strict=True)}
    tables = {"a": np.full(99, 0.3), "b": np.full(99, 0.89), "c": np.full(99, 0.6), "d": np.full(99, 0.1)}
    loss = objectives.guidance_loss(shares, tables, 4)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.15)
    assert [float(shares[name].grad) for name in "abcd"] == pytest.approx([-0.25, -0.25, 0, 0])
    assert float(objectives.guidance_loss(shares, {}, 4)) == 0


def test_compression_losses_by_hand() -> None:
    ratio = torch.tensor(0.9, requires_grad=True)
    assert float(objectives.squared_compression(ratio, 0.6).detach()) == pytest.approx(0.09)
    assert float(objectives.log_ratio_loss(ratio, 0.6).detach()) == pytest.approx(math.log(1.5))
    for met in (0.6, 0.5, 0.6019):
        ratio = torch.tensor(met, requires_grad=True)
        loss = objectives.log_ratio_loss(ratio, 0.6)
        loss.backward()
        assert (float(loss.detach()), float(ratio.grad)) == (0, 0)


def test_language_loss_is_that_of_the_next_tokens() -> None:
    logits, ids = torch.randn(2, 4, 7), torch.randint(0, 7, (2, 4))
    chosen = [float(logits[b, t].log_softmax(0)[ids[b, t + 1]]) for b in range(2) for t in range(3)]
    assert float(objectives.language_loss(logits, ids)) == pytest.approx(-sum(chosen) / 6, rel=1e-5)


def test_alignment_by_hand() -> None:
    """m = 1 0 1 0 keeps two: against 1 1 0 0 the second and third σ differ, ½ and ¼ of the largest."""
    mask, values = torch.tensor([1.0, 0, 1, 0]), torch.tensor([8.0, 4, 2, 1])
    assert float(objectives.alignment_loss(mask, values)) == pytest.approx((0.25 + 0.0625) / 4)
    assert float(objectives.alignment_loss(torch.tensor([1.0, 1, 0, 0]), values)) == 0
    assert float(objectives.alignment_loss(mask, torch.zeros(4))) == 0


def test_total_variation_counts_the_switches() -> None:
    assert float(objectives.total_variation(torch.tensor([1.0, 1, 0, 0]))) == 0.25
    assert float(objectives.total_variation(torch.tensor([1.0, 0, 1, 0]))) == 0.75
    assert float(objectives.total_variation(torch.ones(4))) == 0
    assert float(objectives.total_variation(torch.ones(1))) == 0


def test_distillation_is_relative_token_by_token() -> None:
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 100.0]]])
    student = torch.tensor([[[3.0, 4.0 + 5.0], [0.0, 100.0]]])
    assert float(objectives.distillation_loss([student], [teacher])) == pytest.approx(0.5)  # 25 / 25, of two tokens
    assert float(objectives.distillation_loss([student, teacher], [teacher, teacher])) == pytest.approx(0.5)


def test_the_weight_oscillates_between_its_bounds() -> None:
    values = [objectives.oscillating(step, 20, 0.25, 2.0) for step in range(60)]
    assert values[0] == values[20] == pytest.approx(0.25)
    assert values[10] == pytest.approx(2.0)
    assert values[5] == pytest.approx(1.125)
    assert min(values) >= 0.25 - 1e-12
    assert max(values) <= 2 + 1e-12


def test_ranks_out_of_range_cost_their_distance() -> None:
    ranks = {"a": torch.tensor(-1.0), "b": torch.tensor(12.0), "c": torch.tensor(5.0)}
    assert float(objectives.range_penalty(ranks, dict.fromkeys("abc", 10))) == pytest.approx((0.2 + 0.2) / 3)
