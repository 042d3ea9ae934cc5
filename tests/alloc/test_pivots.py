"""Pivot forms: nothing is lost and coefficients stay small, whichever way the rows are chosen, wherever it is done."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE, draw, relative_error

from rankwise.alloc import pivots
from rankwise.alloc.pivots import LARGEST, Chosen, by_exchange, by_qr, pivot_form
from rankwise.kernels import pivot_linear

Choose = Callable[[torch.Tensor], Chosen]
WAYS = pytest.mark.parametrize("choose", [by_qr, by_exchange])


def dense(index: torch.Tensor, basis: torch.Tensor, coeff: torch.Tensor) -> torch.Tensor:
    """The weight that the three tensors stand for, row by row."""
    rank, rows = len(basis), []
    for entry in index.tolist():
        rows.append(basis[entry] if entry < rank else coeff[entry - rank].double() @ basis.double())
    return torch.stack([row.double() for row in rows])


@WAYS
@pytest.mark.parametrize(("m", "rank"), [(40, 8), (40, 39), (40, 1), (2, 1), (100, 60)])
def test_nothing_is_lost(choose: Choose, m: int, rank: int) -> None:
    u, v = draw(m, rank), draw(rank, 30)
    index, basis, coeff = pivot_form(u, v, choose)
    assert (index.dtype, basis.dtype, coeff.dtype) == (torch.int32, torch.float32, torch.float32)
    assert sorted(index.tolist()) == list(range(m))
    assert basis.shape == (rank, 30)
    assert coeff.shape == (m - rank, rank)
    assert relative_error(dense(index, basis, coeff), u @ v) < 3e-7  # fp32 is what they are stored in
    assert float(coeff.abs().max()) < 3
    x = draw(5, 30)
    assert relative_error(pivot_linear(x, index, basis.double(), coeff.double()), x @ (u @ v).T) < 1e-6


@WAYS
def test_pivots_are_rows_of_the_product(choose: Choose) -> None:
    u, v = draw(20, 6), draw(6, 15)
    index, basis, _ = pivot_form(u, v, choose)
    chosen = torch.argsort(index)[:6]  # the row of each basis vector
    assert torch.equal(basis, (u[chosen] @ v).float())


@pytest.mark.parametrize(("m", "rank"), [(60, 30), (100, 60), (300, 200)])
def test_exchanges_end_where_no_coefficient_is_large(m: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, and with coefficients that are no larger in the mean than QR's."""
    u = draw(m, rank)
    _, other = by_qr(u)
    monkeypatch.setattr(pivots, "by_qr", pytest.fail)
    order, coeff = by_exchange(u)
    assert sorted(order.tolist()) == list(range(m))
    assert relative_error(coeff @ u[order[:rank]], u[order[rank:]]) < 1e-11
    assert float(coeff.abs().max()) <= LARGEST < float(other.abs().max())
    assert float(coeff.square().mean()) < 1.05 * float(other.square().mean())


def test_the_host_goes_by_qr_and_a_device_by_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    u, v = draw(12, 5), draw(5, 8)
    monkeypatch.setattr(pivots, "by_exchange" if DEVICE == "cpu" else "by_qr", pytest.fail)
    assert sorted(pivot_form(u, v)[0].tolist()) == list(range(12))


@WAYS
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_dependent_columns(choose: Choose, rank: int) -> None:
    u, v = draw(30, rank) @ draw(rank, 8), draw(8, 25)
    index, basis, coeff = pivot_form(u, v, choose)
    assert relative_error(dense(index, basis, coeff), u @ v) < 1e-6
    assert torch.isfinite(coeff).all()
    assert float(coeff.abs().max()) < 3


@WAYS
@pytest.mark.parametrize("small", [1e-6, 1e-9, 1e-11, 1e-13])
def test_nearly_dependent_columns(choose: Choose, small: float) -> None:
    u, v = draw(30, 8), draw(8, 25)
    u[:, 3] = u[:, 4] + small * u[:, 3]
    index, basis, coeff = pivot_form(u, v, choose)
    assert relative_error(dense(index, basis, coeff), u @ v) < 1e-6
    assert float(coeff.abs().max()) < 3


@WAYS
def test_zero_and_equal_rows(choose: Choose) -> None:
    u, v = draw(20, 5), draw(5, 9)
    u[3], u[4], u[17] = 0, u[9], -2 * u[9]
    index, basis, coeff = pivot_form(u, v, choose)
    weight = dense(index, basis, coeff)
    assert relative_error(weight, u @ v) < 1e-6
    assert float(weight[3].norm()) < 1e-6
    assert torch.allclose(weight[17], -2 * weight[4], atol=1e-5)


@WAYS
def test_zero(choose: Choose) -> None:
    index, basis, coeff = pivot_form(torch.zeros(6, 2, device=DEVICE), torch.zeros(2, 3, device=DEVICE), choose)
    assert sorted(index.tolist()) == list(range(6))
    assert not dense(index, basis, coeff).any()


@WAYS
def test_coefficients_stay_moderate_where_elimination_grows(choose: Choose) -> None:
    u = torch.tril(-torch.ones(60, 40, dtype=torch.float64), -1) + torch.eye(60, 40, dtype=torch.float64)
    index, basis, coeff = pivot_form(u.to(DEVICE), torch.eye(40).to(DEVICE), choose)
    assert relative_error(dense(index, basis, coeff), u.to(DEVICE)) < 1e-6
    assert float(coeff.abs().max()) < 10


@WAYS
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 25), st.integers(1, 25), st.integers(0, 1000), st.data())
def test_anything(choose: Choose, m: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, m - 1))
    true_rank = data.draw(st.integers(1, rank))
    scale = 10.0 ** data.draw(st.integers(-6, 6))
    u, v = scale * draw(m, true_rank, seed=seed) @ draw(true_rank, rank, seed=seed), draw(rank, n, seed=seed)
    index, basis, coeff = pivot_form(u, v, choose)
    assert sorted(index.tolist()) == list(range(m))
    assert relative_error(dense(index, basis, coeff), u @ v) < 1e-5
    assert float(coeff.abs().max()) < 50
