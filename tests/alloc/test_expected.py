"""What rounding is expected to cost, against rounding that is carried out."""

from typing import Any

import pytest
import torch

from rankwise.alloc.expected import expected_dense, expected_lowrank, expected_pivot
from rankwise.alloc.factors import factorize
from rankwise.alloc.feedback import triangle
from rankwise.alloc.pivots import pivot_form
from rankwise.alloc.rounding import round_dense, round_lowrank, round_pivot
from rankwise.alloc.scales import Grid

GRIDS = [Grid("int4", 32), Grid("int4", 64), Grid("int4", 64, False), Grid("nf4", 64), Grid("int8", None)]
TWO = pytest.mark.parametrize("two", [False, True], ids=["one-sided", "two-sided"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, seed: int) -> torch.Tensor:
    """Directions thirtyfold apart in size, not along the axes."""
    x = draw(4 * size, size, seed=seed) * torch.logspace(-0.75, 0.75, size, dtype=torch.float64)
    turn = torch.linalg.qr(draw(size, size, seed=seed + 1)).Q
    return turn @ (x.T @ x) @ turn.T / len(x)


def problem(two: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return draw(96, 128, seed=3), moment(128, 5), moment(96, 7) if two else None


def both(matrix: torch.Tensor | None) -> Any:
    return None if matrix is None else (matrix, triangle(matrix))


@TWO
def test_dense(two: bool) -> None:
    w, c, f = problem(two)
    found = expected_dense(w, GRIDS, triangle(c), None if f is None else triangle(f))
    for grid, loss in zip(GRIDS, found, strict=True):
        assert loss == pytest.approx(round_dense(w, grid, c, f).loss, rel=0.6)
    assert found[0] < found[1]  # smaller groups have finer steps
    assert expected_dense(2 * w, GRIDS, triangle(c), None)[0] > 3.9 * expected_dense(w, GRIDS, triangle(c), None)[0]


def test_dense_without_metrics_is_the_variance_of_a_step() -> None:
    """Where nothing correlates, the expectation is that of rounding by itself, to the percent."""
    w, unit = draw(64, 4096, seed=1), torch.eye(4096, dtype=torch.float64)
    [found] = expected_dense(w, [Grid("int4", 64)], triangle(unit), None)
    step = w.unflatten(1, (-1, 64)).abs().amax(2, keepdim=True) / 8
    rounded = (w.unflatten(1, (-1, 64)) / step).round() * step
    error = float((rounded.flatten(1) - w).square().sum()) / 2
    assert found == pytest.approx(1.01 * error, rel=0.02)  # 1.01: the damping of the metric


@TWO
def test_factors(two: bool) -> None:
    w, c, f = problem(two)
    full = factorize(w, c, f)
    u, v = full.u[:, :64].double(), full.v[:64].double()
    dropped = float(full.energy[64:].sum()) / 2
    lowrank = expected_lowrank(u, v, GRIDS, both(c), both(f))
    pivot = expected_pivot(u, v, GRIDS, both(c), both(f))
    index, basis, coeff = pivot_form(u, v)
    for grid, one, other in zip(GRIDS, lowrank, pivot, strict=True):
        real = round_lowrank(w, u, v, grid, c, f).loss - dropped
        assert one == pytest.approx(real, rel=0.7)
        real = round_pivot(w, index, basis, coeff, grid, c, f).loss - dropped
        assert other == pytest.approx(real, rel=0.8)


@TWO
def test_a_group_that_does_not_divide_the_rank_is_no_choice(two: bool) -> None:
    w, c, f = problem(two)
    full = factorize(w, c, f)
    u, v = full.u[:, :32].double(), full.v[:32].double()
    for expected in (expected_lowrank, expected_pivot):
        found = expected(u, v, GRIDS, both(c), both(f))
        assert found[0] < float("inf")
        assert found[1:4] == [float("inf")] * 3
        assert found[4] < found[0]  # any rank, and finer steps
