"""Factors against explicit singular value decompositions in the metric of the curvature, in fp64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankwise.alloc.factors import (
    ALPHA,
    DAMPING,
    FLOOR,
    Factors,
    damped,
    definite,
    factorize,
    factorize_diagonal,
    spectrum,
)
from rankwise.errors import RankwiseError

SHAPES = [pytest.param(m, n, id=f"{m}x{n}") for m, n in [(12, 20), (16, 16), (20, 12), (1, 8), (8, 1), (1, 1)]]
SIDES = pytest.mark.parametrize("two", [False, True], ids=["one-sided", "two-sided"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)), dtype=torch.float64)


def moments(size: int, tokens: int = 400, seed: int = 1) -> torch.Tensor:
    """`E[x xᵀ]` of inputs whose channels differ a hundredfold in size."""
    x = draw(tokens, size, seed=seed) * torch.logspace(-1, 1, size, dtype=torch.float64)
    return x.T @ x / tokens


@dataclass
class Problem:
    """A weight and its curvature; `f` is None if one-sided."""

    w: torch.Tensor
    c: torch.Tensor
    f: torch.Tensor | None

    @property
    def full_rank(self) -> int:
        return min(self.w.shape)

    def factors(self) -> Factors:
        return factorize(self.w, self.c, self.f)

    def roots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Left and right factor of the metric: any L with `L Lᵀ` equal to the damped moments will do."""
        left = torch.eye(len(self.w), dtype=torch.float64) if self.f is None else cholesky(self.f).T
        return left, cholesky(self.c)

    def error(self, approximation: torch.Tensor) -> float:
        """Squared error in the metric."""
        left, right = self.roots()
        return float((left @ (self.w - approximation.double()) @ right).square().sum())

    def best(self) -> torch.Tensor:
        """Squared singular values in the metric: the loss of rank k is the sum of what lies behind k."""
        left, right = self.roots()
        return torch.linalg.svdvals(left @ self.w @ right).square()


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Of the damped matrix, as factorize documents the damping."""
    size = len(matrix)
    return torch.linalg.cholesky(matrix + DAMPING * matrix.diagonal().mean() * torch.eye(size, dtype=torch.float64))


def problem(m: int, n: int, two: bool, seed: int = 0) -> Problem:
    turn = torch.linalg.qr(draw(n, n, seed=seed + 3)).Q
    return Problem(draw(m, n, seed=seed), turn @ moments(n) @ turn.T, moments(m, seed=5) if two else None)


def product(factors: Factors, rank: int) -> torch.Tensor:
    return factors.u[:, :rank].double() @ factors.v[:rank].double()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- the optimum ------------------------------------------------------------------------------------------------------


@SIDES
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_every_rank_is_as_good_as_the_explicit_optimum(m: int, n: int, two: bool) -> None:
    task = problem(m, n, two)
    factors, best = task.factors(), task.best()
    for rank in range(task.full_rank + 1):
        optimum = float(best[rank:].sum())
        assert task.error(product(factors, rank)) == pytest.approx(optimum, rel=1e-5, abs=1e-10 * float(best.sum()))


@SIDES
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_energy_is_the_squared_singular_values(m: int, n: int, two: bool) -> None:
    task = problem(m, n, two)
    energy, best = task.factors().energy, task.best()
    assert energy.dtype == torch.float64
    assert torch.allclose(energy, best, rtol=1e-8, atol=1e-12 * float(best[0]))
    undamped = torch.linalg.svdvals(
        (torch.eye(m, dtype=torch.float64) if task.f is None else torch.linalg.cholesky(task.f).T)
        @ task.w
        @ torch.linalg.cholesky(task.c)
    ).square()
    assert torch.allclose(energy, undamped, rtol=1e-2)  # the damping is small, also for the quiet directions
    assert float(energy[0]) == pytest.approx(float(undamped[0]), rel=1e-4)


@pytest.mark.parametrize(("m", "n"), [(12, 20), (16, 16), (20, 12)])
def test_one_sided_is_whitening(m: int, n: int) -> None:
    task = problem(m, n, two=False)
    factors, whitener = task.factors(), cholesky(task.c)
    left, values, right = torch.linalg.svd(task.w @ whitener, full_matrices=False)
    for rank in (1, 5, 9):
        expected = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(whitener)
        assert relative_error(product(factors, rank), expected) < 1e-5


@pytest.mark.parametrize(("m", "n"), [(12, 20), (16, 16), (20, 12)])
def test_two_sided_is_whitening_on_both_sides(m: int, n: int) -> None:
    task = problem(m, n, two=True)
    factors, (left_root, right_root) = task.factors(), task.roots()
    left, values, right = torch.linalg.svd(left_root @ task.w @ right_root, full_matrices=False)
    for rank in (1, 5, 9):
        middle = (left[:, :rank] * values[:rank]) @ right[:rank]
        expected = torch.linalg.inv(left_root) @ middle @ torch.linalg.inv(right_root)
        assert relative_error(product(factors, rank), expected) < 1e-5


def test_identity_metric_is_the_plain_decomposition() -> None:
    w = draw(10, 14)
    for outputs in (None, torch.eye(10)):
        factors = factorize(w, torch.eye(14), outputs)
        left, values, right = torch.linalg.svd(w, full_matrices=False)
        assert torch.allclose(factors.energy, values.square(), rtol=1e-5)
        assert relative_error(product(factors, 4), (left[:, :4] * values[:4]) @ right[:4]) < 1e-5


def test_two_sided_reduces_to_one_sided_where_outputs_are_alike() -> None:
    task = problem(12, 20, two=False)
    one, two = task.factors(), factorize(task.w, task.c, 4 * torch.eye(12))
    assert torch.allclose(two.energy, 4 * one.energy, rtol=1e-5)
    assert relative_error(product(two, 5), product(one, 5)) < 1e-5


@SIDES
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_full_rank_gives_the_weight_back(m: int, n: int, two: bool) -> None:
    task = problem(m, n, two)
    factors = task.factors()
    assert factors.u.shape == (m, min(m, n))
    assert factors.v.shape == (min(m, n), n)
    assert relative_error(product(factors, min(m, n)), task.w) < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 10), st.integers(2, 10), st.booleans(), st.integers(0, 1000), st.data())
def test_no_other_projection_of_that_rank_is_better(m: int, n: int, two: bool, seed: int, data: st.DataObject) -> None:
    task = problem(m, n, two, seed)
    rank = data.draw(st.integers(1, min(m, n)))
    ours = task.error(product(task.factors(), rank))
    slack = 1e-6 * float(task.best().sum())
    left, right = task.roots()
    inside = left @ task.w @ right
    rows, columns = (torch.linalg.qr(draw(size, rank, seed=seed + 1)).Q for size in (m, n))
    undo_left, undo_right = torch.linalg.inv(left), torch.linalg.inv(right)
    assert ours <= task.error(undo_left @ rows @ rows.T @ inside @ undo_right) + slack
    assert ours <= task.error(undo_left @ inside @ columns @ columns.T @ undo_right) + slack
    basis = torch.linalg.svd(task.w, full_matrices=False)
    assert ours <= task.error((basis.U[:, :rank] * basis.S[:rank]) @ basis.Vh[:rank]) + slack  # plain truncation


@SIDES
def test_factors_share_the_norm_of_a_component(two: bool) -> None:
    factors = problem(12, 20, two).factors()
    assert torch.allclose(factors.u.norm(dim=0), factors.v.norm(dim=1), rtol=1e-4)


# --- inputs that real models bring ------------------------------------------------------------------------------------


@SIDES
@pytest.mark.parametrize("scale", [1e12, 1e-12])
@pytest.mark.parametrize(("m", "n"), [(12, 20), (16, 16), (20, 12)])
def test_scale_of_the_curvature_does_not_matter(m: int, n: int, scale: float, two: bool) -> None:
    task = problem(m, n, two)
    factors = task.factors()
    scaled = Problem(task.w, task.c * scale, None if task.f is None else task.f * scale).factors()
    for rank in range(1, task.full_rank + 1):
        assert relative_error(product(scaled, rank), product(factors, rank)) < 1e-5
    assert torch.allclose(scaled.u.norm(dim=0), factors.u.norm(dim=0), rtol=1e-4)
    assert torch.allclose(scaled.energy / scale ** (2 if two else 1), factors.energy, rtol=1e-7)


@SIDES
@pytest.mark.parametrize(("m", "n"), [(12, 20), (16, 16), (20, 12)])
@pytest.mark.parametrize("case", ["dead-channels", "few-tokens", "outlier-channels"])
def test_singular_curvature_is_as_good_as_any(case: str, m: int, n: int, two: bool) -> None:
    task = problem(m, n, two)
    if case == "dead-channels":
        for matrix in [task.c] if task.f is None else [task.c, task.f]:
            matrix[:, 2:5] = 0
            matrix[2:5] = 0
    elif case == "few-tokens":
        x, g = draw(4, n), draw(3, m)
        task.c, task.f = x.T @ x / 4, g.T @ g / 3 if two else None
    else:
        scale = torch.ones(n, dtype=torch.float64)
        scale[:2] = 1000
        task.c = task.c * scale * scale[:, None]
    factors, best = task.factors(), task.best()
    assert torch.isfinite(factors.energy).all()
    assert torch.isfinite(factors.u).all()
    assert torch.isfinite(factors.v).all()
    assert relative_error(product(factors, task.full_rank), task.w) < 1e-5
    for rank in range(task.full_rank):
        optimum = float(best[rank:].sum())
        assert task.error(product(factors, rank)) == pytest.approx(optimum, rel=1e-3, abs=1e-9 * float(best.sum()))


@SIDES
@pytest.mark.parametrize(("m", "n"), [(12, 20), (16, 16), (20, 12)])
def test_weight_of_low_rank_is_found_out(m: int, n: int, two: bool) -> None:
    task = problem(m, n, two)
    task.w = draw(m, 5) @ draw(5, n)
    factors = task.factors()
    assert float(factors.energy[5:].sum()) < 1e-12 * float(factors.energy.sum())
    assert float(factors.energy[4]) > 1e-9 * float(factors.energy[0])
    assert relative_error(product(factors, 5), task.w) < 1e-6
    assert relative_error(product(factors, task.full_rank), task.w) < 1e-6


@SIDES
@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_zero_weight(m: int, n: int, two: bool) -> None:
    task = problem(m, n, two)
    task.w = torch.zeros(m, n, dtype=torch.float64)
    factors = task.factors()
    assert not product(factors, 6).any()
    assert not factors.energy.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12)])
def test_stored_weights_are_factored_exactly(m: int, n: int, dtype: torch.dtype) -> None:
    task = problem(m, n, two=True)
    stored = task.w.to(dtype)
    factors = factorize(stored, task.c.float(), None if task.f is None else task.f.float())
    assert factors.u.dtype == factors.v.dtype == torch.float32
    assert relative_error(product(factors, 12), stored) < 1e-6  # nothing is lost beyond fp32 rounding
    exact = Problem(stored.double(), task.c.float().double(), None if task.f is None else task.f.float().double())
    assert torch.allclose(factors.energy, exact.best(), rtol=1e-7)


@SIDES
def test_weights_still_in_training_leave_no_graph(two: bool, recwarn: pytest.WarningsRecorder) -> None:
    task = problem(12, 20, two)
    expected = task.factors()
    task.w = nn.Parameter(task.w)  # as `from_pretrained` returns them
    factors = task.factors()
    assert not any(tensor.requires_grad for tensor in (factors.u, factors.v, factors.energy))
    assert torch.equal(factors.u, expected.u)
    assert not recwarn.list


@pytest.mark.parametrize("zero", ["inputs", "outputs", "both"])
@pytest.mark.parametrize(("m", "n"), [(12, 20), (16, 16), (20, 12)])
def test_a_layer_never_reached_has_infinite_energy(m: int, n: int, zero: str) -> None:
    task = problem(m, n, two=True)
    assert task.f is not None
    if zero in ("inputs", "both"):
        task.c = torch.zeros_like(task.c)
    if zero in ("outputs", "both"):
        task.f = torch.zeros_like(task.f)
    factors = task.factors()
    assert torch.equal(factors.energy, torch.full((min(m, n),), torch.inf, dtype=torch.float64))
    assert relative_error(product(factors, min(m, n)), task.w) < 1e-6
    if zero == "both":  # the plain metric
        left, values, right = torch.linalg.svd(task.w, full_matrices=False)
        assert relative_error(product(factors, 4), (left[:, :4] * values[:4]) @ right[:4]) < 1e-6


def test_zero_inputs_one_sided() -> None:
    w = draw(8, 12)
    factors = factorize(w, torch.zeros(12, 12))
    assert torch.isinf(factors.energy).all()
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    assert relative_error(product(factors, 3), (left[:, :3] * values[:3]) @ right[:3]) < 1e-6


# --- the diagonal metric ----------------------------------------------------------------------------------------------


def magnitudes(n: int, seed: int = 4) -> torch.Tensor:
    return draw(n, seed=seed).abs() * torch.logspace(-2, 2, n, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.25, ALPHA, 1.0])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_diagonal_is_the_scaled_decomposition(m: int, n: int, alpha: float) -> None:
    """ASVD: SVD of W S, times S⁻¹; against numpy in fp64."""
    w, sizes = draw(m, n), magnitudes(n)
    scale = sizes.numpy() ** alpha
    left, values, right = np.linalg.svd(w.numpy() * scale, full_matrices=False)
    factors = factorize_diagonal(w, sizes, alpha=alpha)
    assert factors.energy.dtype == torch.float64
    assert np.allclose(factors.energy.numpy(), values**2, rtol=1e-8, atol=1e-12 * values[0] ** 2)
    for rank in range(1, min(m, n) + 1):
        expected = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank] / scale)
        assert relative_error(product(factors, rank), expected) < 1e-5
        error = ((w - product(factors, rank)).numpy() * scale) ** 2
        assert float(error.sum()) == pytest.approx((values[rank:] ** 2).sum(), rel=1e-5, abs=1e-10 * values[0] ** 2)
    assert torch.allclose(factors.u.norm(dim=0), factors.v.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize(("m", "n"), [(12, 20), (16, 16), (20, 12)])
def test_diagonal_is_the_metric_of_a_diagonal_matrix(m: int, n: int) -> None:
    w, sizes = draw(m, n), magnitudes(n) + 1
    ours, full = factorize_diagonal(w, sizes), factorize(w, torch.diag(sizes), damping=0.0)
    assert torch.allclose(ours.energy, full.energy, rtol=1e-9)
    assert relative_error(product(ours, 5), product(full, 5)) < 1e-6


@pytest.mark.parametrize(("m", "n"), [(12, 20), (16, 16), (20, 12)])
def test_dead_features_count_as_the_floor(m: int, n: int) -> None:
    w, sizes = draw(m, n), magnitudes(n)
    sizes[2:5] = 0
    factors = factorize_diagonal(w, sizes)
    assert all(torch.isfinite(tensor).all() for tensor in (factors.u, factors.v, factors.energy))
    assert relative_error(product(factors, min(m, n)), w) < 1e-5
    lifted = factorize_diagonal(w, sizes.clamp_min(FLOOR * float(sizes.mean())))
    assert relative_error(product(factors, 5), product(lifted, 5)) < 1e-5
    assert torch.allclose(factors.energy, lifted.energy, rtol=1e-5)  # lifting them lifts the mean a little


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12)])
def test_diagonal_of_a_layer_never_reached(m: int, n: int) -> None:
    w = draw(m, n)
    factors = factorize_diagonal(w, torch.zeros(n))
    assert torch.isinf(factors.energy).all()
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    assert relative_error(product(factors, 4), (left[:, :4] * values[:4]) @ right[:4]) < 1e-6


@pytest.mark.parametrize("scale", [1e12, 1e-12])
def test_diagonal_does_not_depend_on_the_scale(scale: float) -> None:
    w, sizes = draw(12, 20), magnitudes(20)
    assert (
        relative_error(product(factorize_diagonal(w, sizes * scale), 5), product(factorize_diagonal(w, sizes), 5))
        < 1e-6
    )


def test_diagonal_of_a_zero_weight() -> None:
    factors = factorize_diagonal(torch.zeros(6, 9), magnitudes(9))
    assert not product(factors, 6).any()
    assert not factors.energy.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_magnitudes_that_are_none_are_refused(value: float) -> None:
    sizes = magnitudes(9)
    sizes[3] = value
    with pytest.raises(RankwiseError, match="input magnitudes: NaN, Inf or negative"):
        factorize_diagonal(draw(6, 9), sizes)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("side", "named"), [("inputs", "input moments"), ("outputs", "output-gradient moments")])
@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_numbers_that_are_none_name_the_side(m: int, n: int, side: str, named: str, value: float) -> None:
    task = problem(m, n, two=True)
    assert task.f is not None
    (task.c if side == "inputs" else task.f)[1, 2] = value
    with pytest.raises(RankwiseError, match="NaN or Inf") as caught:
        task.factors()
    assert caught.value.field == named


@pytest.mark.parametrize("spectrum", ["one-negative", "all-negative", "trace-zero", "small-negative"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize(("m", "n"), [(8, 8), (8, 12), (12, 8)])
def test_indefinite_moments_are_refused(m: int, n: int, side: str, spectrum: str) -> None:
    task = problem(m, n, two=True)
    size = n if side == "inputs" else m
    values = {
        "one-negative": torch.cat([-2 * torch.ones(1), torch.ones(size - 1)]),
        "all-negative": -5 * torch.ones(size),
        "trace-zero": torch.tensor([1.0, -1.0]).repeat(size)[:size],
        "small-negative": -0.5 * torch.ones(size),
    }[spectrum].double()
    turn = torch.linalg.qr(draw(size, size, seed=9)).Q
    bad = (turn * values) @ turn.T
    inputs, outputs = (bad, task.f) if side == "inputs" else (task.c, bad)
    with pytest.raises(RankwiseError, match="indefinite"):
        factorize(task.w, inputs, outputs)


@SIDES
def test_negative_rounding_errors_pass(two: bool) -> None:
    task = problem(8, 12, two)
    x = draw(3, 12).float()
    task.c = (x.T @ x / 3).double()
    task.c -= 1e-7 * task.c.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(task.c)[0]) < 0
    assert relative_error(product(task.factors(), 8), task.w) < 1e-5


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_spectrum_alone_is_that_of_the_factors(m: int, n: int) -> None:
    w, c, f = draw(m, n), moments(n), moments(m, seed=2)
    found = spectrum(w, definite(c), definite(f))
    torch.testing.assert_close(found, factorize(w, c, f).energy, rtol=1e-8, atol=1e-12)


def test_directions_that_rounding_made_negative_count_a_little() -> None:
    q = torch.linalg.qr(draw(12, 12)).Q
    values = torch.logspace(0, -3, 12, dtype=torch.float64)
    values[-1] = -1e-5
    matrix = (q * values) @ q.T
    found = torch.linalg.eigvalsh(definite(matrix))
    assert float(found[0]) > 0
    torch.testing.assert_close(found.flip(0)[:-1], values[:-1], rtol=1e-3, atol=1e-9)
    assert torch.equal(definite(moments(6)), damped(moments(6)))
