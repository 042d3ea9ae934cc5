"""Parametrisations of masks: the staircase against its matrix, the others against their formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.alloc.masks import (
    AbsorbingStaircase,
    Staircase,
    Tanh,
    soft_staircase,
    straight_through,
    two_level,
)

SIZES, LEVELS = st.integers(1, 300), st.sampled_from([1, 7, 50, 100])


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(size: int, levels: int) -> torch.Tensor:
    """M `[D + 1, size]` as the paper writes it: row i has ones in the first ⌊size · c_i⌋ places."""
    rows = [[float(j < size * (levels - i) // levels) for j in range(size)] for i in range(levels + 1)]
    return torch.tensor(rows, dtype=torch.float64)


def staircase(size: int, levels: int, seed: int = 0) -> Staircase:
    mask = Staircase(size, size / 2, levels=levels).double()
    mask.alpha.data = 3 * torch.randn(levels + 1, generator=noise(seed), dtype=torch.float64)
    return mask


# --- staircase --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(SIZES, LEVELS, st.integers(0, 99))
def test_soft_mask_is_weights_times_staircase_and_never_rises(size: int, levels: int, seed: int) -> None:
    mask = staircase(size, levels, seed)
    soft = mask.soft().detach()
    torch.testing.assert_close(soft, mask.weights().detach() @ matrix(size, levels), atol=1e-14, rtol=1e-13)
    assert (soft.diff() <= 0).all()
    assert float(soft[0]) <= 1 + 1e-12


@pytest.mark.parametrize(("size", "levels"), [(1, 100), (7, 3), (64, 100), (130, 100)])
def test_jacobian_over_the_weights_is_the_binary_staircase(size: int, levels: int) -> None:
    mask = staircase(size, levels)
    jacobian = torch.autograd.functional.jacobian(
        lambda weights: soft_staircase(weights, mask.get_buffer("last")), mask.weights().detach()
    )
    assert torch.equal(jacobian, matrix(size, levels).T)


def test_every_logit_moves_every_earlier_component() -> None:
    mask = staircase(200, 100)
    jacobian = torch.autograd.functional.jacobian(
        lambda alpha: soft_staircase(alpha.softmax(0), mask.get_buffer("last")), mask.alpha.detach()
    )
    assert (jacobian != 0).all()


@settings(max_examples=80, deadline=None)
@given(st.floats(0.0005, 0.9995), LEVELS)
def test_two_levels_give_the_share_asked_for(share: float, levels: int) -> None:
    logits = two_level(share, levels)
    candidates = torch.arange(levels, -1, -1, dtype=torch.float64) / levels
    assert float(logits.double().softmax(0) @ candidates) == pytest.approx(share, abs=1e-6)
    assert len(logits.unique()) <= 2
    assert (logits[candidates < share] == 0).all()


def test_two_levels_by_hand() -> None:
    """c = 1, ½, 0 and a share of ½: A = {1, ½}, B = {0}, δ = ln[(0 - ½) / (1 - 1½)] = 0."""
    assert two_level(0.5, 2).tolist() == [0, 0, 0]
    assert two_level(0.75, 2).tolist() == pytest.approx([math.log(4), 0, 0])  # (½ - 1½) / (¾ - 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.floats(0.01, 0.99), LEVELS)
def test_the_start_is_the_rank_asked_for(size: int, share: float, levels: int) -> None:
    mask = Staircase(size, share * size, levels=levels)
    assert mask.rank() == pytest.approx(min(max(share * size, 0.05), size - 0.05), abs=1e-3)
    drawn = mask.draw(noise())
    assert drawn.keep == max(1, round(mask.rank()))
    assert int(drawn.mask.detach().sum()) == drawn.keep


@pytest.mark.parametrize("rank", [-3.0, 0.0, 64.0, 99.0])
def test_starts_at_the_ends_can_still_move(rank: float) -> None:
    mask = Staircase(64, rank)
    mask.draw(noise()).rank.backward()
    assert mask.alpha.grad is not None
    assert torch.isfinite(mask.alpha.grad).all()
    assert float(mask.alpha.grad.abs().max()) > 1e-4
    assert mask.draw(noise()).keep == (1 if rank < 1 else 64)


def test_hard_mask_forward_soft_mask_backward() -> None:
    mask = staircase(40, 100)
    drawn = mask.draw(noise())
    kept = round(float(mask.retention().detach()) * 40)
    assert torch.equal(drawn.mask.detach(), (torch.arange(40) < kept).double())
    weights = torch.randn(40, generator=noise(1), dtype=torch.float64)
    through = torch.autograd.grad(drawn.mask @ weights, mask.alpha, retain_graph=True)
    assert torch.equal(through[0], torch.autograd.grad(drawn.soft @ weights, mask.alpha)[0])


def test_straight_through_is_hard_to_the_bit() -> None:
    soft = torch.rand(10_000, generator=noise(), requires_grad=True)
    hard = (soft > 0.3).float()
    assert torch.equal(straight_through(hard, soft).detach(), hard)


def test_rank_is_counted_in_the_span() -> None:
    """The authors' R = ρ q counts the rank without the floor in r_max = ⌊ρ m n / (m + n)⌋."""
    mask = Staircase(23, 11.52, span=23.04)
    assert mask.retention().item() == pytest.approx(0.5, abs=1e-6)
    assert float(mask.draw(noise()).rank.detach()) == pytest.approx(11.52, abs=1e-4)


def test_snapping_decides_what_is_run() -> None:
    mask = Staircase(40, 21.0, snap=lambda rank: (8 * round(rank / 8), rank > 30))
    assert mask.draw(noise()).keep == 24
    mask.alpha.data = two_level(0.9, 100)
    drawn = mask.draw(noise())
    assert (drawn.dense, drawn.keep, float(drawn.mask.detach().sum())) == (True, 40, 40)
    drawn.mask.sum().backward()
    assert mask.alpha.grad is not None
    assert float(mask.alpha.grad.abs().max()) > 0


def test_the_authors_staircase_never_leaves_dense() -> None:
    mask = AbsorbingStaircase(24, 15.0, limit=20.0)
    assert not mask.draw(noise()).dense
    mask.alpha.data = two_level(0.9, 100)
    first, second = mask.draw(noise()), mask.draw(noise())
    assert not first.dense  # the step that finds it still runs as low rank
    assert second.dense
    (second.rank + second.mask.sum()).backward()
    assert mask.alpha.grad is not None
    assert not mask.alpha.grad.any()  # zero, not None: momentum moves on
    mask.alpha.data = two_level(0.2, 100)
    assert mask.draw(noise()).dense
    assert mask.rank() == pytest.approx(4.8, abs=1e-3)  # read again at the end
    copy = AbsorbingStaircase(24, 15.0, limit=20.0)
    copy.load_state_dict(mask.state_dict())
    assert copy.draw(noise()).dense


# --- tanh -------------------------------------------------------------------------------------------------------------


def test_tanh_masks_follow_their_formula() -> None:
    drawn = Tanh(12, 5.5).draw(noise())
    expected = [0.5 * math.tanh(10 * (5.5 - i)) + 0.5 for i in range(1, 13)]
    assert drawn.soft.tolist() == pytest.approx(expected, abs=1e-4)
    assert drawn.mask is drawn.soft
    assert drawn.keep is None
    assert float(drawn.rank.detach()) == pytest.approx(5.5)


def test_tanh_masks_learn_from_the_nearest_components_alone() -> None:
    mask = Tanh(100, 40.4)
    soft = mask.draw(noise()).soft
    slopes = [float(torch.autograd.grad(soft[i], mask.place, retain_graph=True)[0]) for i in range(100)]
    assert max(slopes) == slopes[39]
    assert sum(slope > 1e-6 * max(slopes) for slope in slopes) <= 3


def test_tanh_ranks_stay_within_the_layer() -> None:
    assert Tanh(12, 30.0).rank() == 12
    assert Tanh(12, -4.0).rank() == 1
