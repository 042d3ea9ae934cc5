"""Gumbel-sigmoid masks against their formula, and what their seed fixes."""

import pytest
import torch

from rankwise.alloc.gumbel import GumbelSigmoid, draw_gumbel, keep_probability


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gumbel_masks_are_fixed_by_the_seed() -> None:
    mask = GumbelSigmoid(50, 25.0)
    first, again, other = (mask.draw(noise(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.soft, again.soft)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.soft, other.soft)


def test_gumbel_masks_follow_their_formula() -> None:
    logits = torch.linspace(2, -2, 30, requires_grad=True)
    drawn = draw_gumbel(logits, 0.1, noise(5), any_k=True)
    uniform = torch.rand(30, generator=noise(5))
    soft = torch.sigmoid((logits - torch.log(-torch.log(uniform))) / 0.1)
    torch.testing.assert_close(drawn.soft, soft)
    kept = (soft > 0.5).nonzero()[:, 0]
    assert torch.equal(drawn.keep, kept)
    assert torch.equal(drawn.mask.detach(), (soft > 0.5).float())
    assert float(drawn.rank.detach()) == len(kept)


def test_top_k_masks_keep_as_many_of_the_first() -> None:
    logits = torch.zeros(30, requires_grad=True)
    scattered = draw_gumbel(logits, 0.1, noise(5), any_k=True)
    first = draw_gumbel(logits, 0.1, noise(5), any_k=False)
    assert first.keep == int(scattered.rank)
    assert first.mask.tolist() == [1] * first.keep + [0] * (30 - first.keep)


@pytest.mark.parametrize("level", [-60.0, 60.0])
def test_extreme_logits_keep_one_or_all(level: float) -> None:
    drawn = draw_gumbel(torch.full((20,), level, requires_grad=True), 0.1, noise(), any_k=True)
    assert drawn.mask.sum() == (20 if level > 0 else 1)
    assert torch.isfinite(drawn.soft).all()


def test_keep_probability_is_how_often_a_component_is_kept() -> None:
    logits = torch.tensor([-2.0, -1, 0, 1, 2])
    draws = torch.stack([draw_gumbel(logits, 0.1, noise(seed), any_k=True).mask for seed in range(4000)])
    torch.testing.assert_close(draws.mean(0), keep_probability(logits), atol=0.03, rtol=0)


def test_the_papers_start_keeps_all() -> None:
    mask = GumbelSigmoid(40)
    assert mask.logits[0].item() == 6
    assert mask.logits[-1].item() == 3
    assert mask.draw(noise()).keep == 40
    assert mask.rank() == pytest.approx(40, abs=1e-3)


@pytest.mark.parametrize("rank", [1.0, 60.0, 140.0, 199.0])
def test_a_start_at_a_rank_keeps_as_many_on_average(rank: float) -> None:
    mask = GumbelSigmoid(200, rank)
    assert mask.rank() == pytest.approx(rank, abs=1e-2)
    assert (mask.logits.diff() < 0).all()
