"""Shares against ranks: the plan's own counts at whole ranks, inverses, and the nearest choice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.alloc.budget import layer_choices
from rankwise.alloc.curve import Curve, Ledger, at_most_one, nearest
from rankwise.plan import KINDS, layer_parameters

SIDES = st.integers(1, 60)


@settings(max_examples=80, deadline=None)
@given(SIDES, SIDES, st.booleans(), st.data())
def test_whole_ranks_cost_what_a_plan_says(m: int, n: int, pivot: bool, data: st.DataObject) -> None:
    curve, rank = Curve(m, n, pivot), data.draw(st.integers(0, min(m, n)))
    assert curve.share(float(rank)) == pytest.approx(
        layer_parameters("pivot" if pivot else "lowrank", rank, m, n) / (m * n)
    )
    assert curve.rank(curve.share(float(rank))) == pytest.approx(rank, abs=1e-5)
    assert curve.share(curve.limit) == pytest.approx(1)


def test_pivot_shares_rise_smoothly_to_one_at_full_rank() -> None:
    curve = Curve(48, 32, True)
    ranks = torch.arange(1.0, 33, requires_grad=True)
    shares = curve.share(ranks)
    shares.sum().backward()
    assert float(shares[-1].detach()) == 1
    torch.testing.assert_close(ranks.grad, (80 - 2 * ranks.detach()) / (48 * 32))
    assert (ranks.grad > 0).all()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(9, 60),
    st.integers(9, 60),
    st.sampled_from([KINDS, ("dense", "lowrank"), ("pivot",)]),
    st.sampled_from([1, 4, 8]),
    st.floats(0, 80),
)
def test_the_nearest_choice_is_nearest_in_parameters(
    m: int, n: int, kinds: tuple[str, ...], multiple: int, rank: float
) -> None:
    entry = layer_choices(m, n, np.ones(min(m, n)), kinds, multiple)
    if not entry.kind:
        return
    curve = Curve(m, n, "pivot" in kinds)
    rank = min(rank, float(min(m, n)))
    found, dense = nearest(entry, curve)(rank)
    wanted = curve.share(rank) * m * n
    options = {(int(r), k == "dense"): abs(int(c) - wanted) for k, r, c in zip(*vars_of(entry), strict=True)}
    assert options[found, dense] == pytest.approx(min(options.values()))


def vars_of(entry: object) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    return entry.kind, entry.rank, entry.cost  # type: ignore[attr-defined]


def test_a_lowrank_layer_turns_dense_where_its_share_comes_near_one() -> None:
    snap = nearest(layer_choices(48, 32, np.ones(32), ("dense", "lowrank"), 1), Curve(48, 32, False))
    assert snap(10.2) == (10, False)
    assert snap(19.0) == (19, False)  # 1520 of 1536
    assert snap(19.15) == (32, True)
    assert snap(23.0) == (32, True)


def test_the_ledger_counts_every_layer_once() -> None:
    ledger = Ledger({"a": Curve(4, 5, True), "b": Curve(10, 10, False)}, fixed=30)
    assert ledger.total == 150
    kept = ledger.kept({"a": torch.tensor(0.5), "b": torch.tensor(0.2)})
    assert float(kept) == pytest.approx((10 + 20 + 30) / 150)


def test_shares_above_one_count_as_one_and_can_still_fall() -> None:
    share = torch.tensor([0.5, 1.0, 1.7], requires_grad=True)
    bounded = at_most_one(share)
    bounded.sum().backward()
    torch.testing.assert_close(bounded.detach(), torch.tensor([0.5, 1.0, 1.0]))
    assert share.grad is not None
    assert share.grad.tolist() == [1, 1, 1]
