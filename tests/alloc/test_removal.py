"""What a channel costs, and what the others do about it, against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.alloc.removal import removal_order, without
from rankwise.errors import RankwiseError


def metric(size: int, seed: int) -> torch.Tensor:
    """Positive definite, with features of unlike sizes that know of each other."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    sizes = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
    return sizes[:, None] * (root @ root.T / size + torch.eye(size, dtype=torch.float64)) * sizes


def loss(weight: torch.Tensor, kept: torch.Tensor, new: torch.Tensor, c: torch.Tensor, f: torch.Tensor) -> float:
    """½ tr(F E C Eᵀ) of the weight `new` on the channels `kept`."""
    error = weight.clone()
    error[:, kept] -= new
    return float(((f @ error) * (error @ c)).sum() / 2)


def case(m: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed + 7), dtype=torch.float64)
    return weight, metric(n, seed), metric(m, seed + 1)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 6), n=st.integers(2, 8), seed=st.integers(0, 50))
def test_each_channel_is_the_cheapest_and_costs_what_it_says(m: int, n: int, seed: int) -> None:
    weight, c, f = case(m, n, seed)
    order, losses = removal_order(weight, c, f, n - 1)
    assert losses[0] == 0
    for step in range(n - 1):
        stays = [i for i in range(n) if i not in order[:step].tolist()]
        costs = {}
        for channel in stays:
            kept = torch.tensor([i for i in stays if i != channel])
            costs[channel] = loss(weight, kept, without(weight, c, kept), c, f)
        assert costs[int(order[step])] == pytest.approx(min(costs.values()), rel=1e-7)
        assert float(losses[step + 1]) == pytest.approx(costs[int(order[step])], rel=1e-7)


@pytest.mark.parametrize("at_once", [1, 3, 7, 64])
def test_when_the_matrices_are_brought_up_to_date_makes_no_difference(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, c, f = case(20, 40, 2)
    expected = removal_order(weight, c, f, 30)
    monkeypatch.setattr("rankwise.alloc.removal.AT_ONCE", at_once)
    order, losses = removal_order(weight, c, f, 30)
    assert torch.equal(order, expected[0])
    torch.testing.assert_close(losses, expected[1], rtol=1e-9, atol=0)


def test_what_is_left_is_the_best_that_it_can_be() -> None:
    weight, c, f = case(5, 9, 3)
    kept = torch.tensor([0, 2, 3, 7, 8])
    new = without(weight, c, kept).requires_grad_(True)
    error = torch.cat([weight[:, kept] - new, weight[:, [1, 4, 5, 6]]], dim=1)
    order = torch.tensor([0, 2, 3, 7, 8, 1, 4, 5, 6])
    ((f @ error) * (error @ c[order][:, order])).sum().backward()
    assert new.grad is not None
    assert float(new.grad.abs().max()) < 1e-10
    assert torch.equal(without(weight, c, torch.arange(9)), weight)


def test_a_channel_that_another_repeats_is_free() -> None:
    weight, c, f = case(4, 6, 5)
    copy = torch.eye(6, dtype=torch.float64)
    copy[2] = copy[4]  # x_2 = x_4
    c = copy @ c @ copy.T
    c.diagonal().add_(1e-12)
    order, losses = removal_order(weight, c, f, 1)
    assert int(order[0]) in (2, 4)
    assert float(losses[1]) < 1e-9


def test_moments_that_are_none_are_refused() -> None:
    weight, c, f = case(3, 4, 0)
    with pytest.raises(RankwiseError, match="not positive definite"):
        removal_order(weight, c - 100 * torch.eye(4), f, 2)
