"""Block Jacobi in Triton: orthogonal vectors, orthogonal rows and the right lengths, whatever the matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE, draw, in_triton, needs_triton, relative_error

from rankwise.kernels.jacobi import SWEEPS, jacobi, jacobi_reference

pytestmark = needs_triton
SHAPES = [pytest.param(*s, id="x".join(map(str, s))) for s in [(2, 5, 9), (1, 12, 20), (2, 1, 3), (1, 7, 4), (1, 3, 1)]]
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
DTYPES = pytest.mark.parametrize("dtype", EPS, ids=["fp32", "fp64"])


def check(x: torch.Tensor, *, half: int | None = None, floor: float | None = None) -> torch.Tensor:
    """All that is promised, against LAPACK in fp64; returns the values."""
    eps = EPS[x.dtype]
    with in_triton():
        basis, values = jacobi(x, half=half, floor=floor)
    exact = jacobi_reference(x.double())[1]
    largest = exact[:, :1].clamp_min(1e-150)
    b, rows = basis.double(), basis.double() @ x.double()
    assert float((b @ b.mT - torch.eye(x.shape[1], device=DEVICE)).abs().max()) <= 16 * eps
    assert float(((values - exact).abs() / largest).max()) <= 16 * eps
    gram = (rows @ rows.mT) / largest[:, :, None] ** 2
    assert float((gram - torch.diag_embed((exact / largest) ** 2)).abs().max()) <= 64 * eps
    assert bool((values.diff(dim=1) <= 0).all())
    return values


def turned(spectrum: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """A random matrix with these singular values."""
    s = len(spectrum)
    u, v = torch.linalg.qr(draw(s, s, seed=1)).Q, torch.linalg.qr(draw(length, s, seed=2)).Q
    return (u * spectrum.to(DEVICE) @ v.mT)[None].to(dtype)


@DTYPES
@pytest.mark.parametrize(("batch", "rows", "columns"), SHAPES)
def test_equals_lapack(batch: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    check(draw(batch, rows, columns, dtype=dtype))


@DTYPES
def test_blocks_that_meet_in_a_tournament(dtype: torch.dtype) -> None:
    check(draw(1, 18, 21, dtype=dtype), half=8)


@pytest.mark.parametrize(("dtype", "half"), [(torch.float32, 8), (torch.float64, 16)], ids=["fp32", "fp64"])
def test_spectra_down_to_1e_12(dtype: torch.dtype, half: int) -> None:
    check(turned(torch.logspace(0, -12, 18, dtype=torch.float64), 24, dtype), half=half)


@DTYPES
def test_rank_deficient(dtype: torch.dtype) -> None:
    values = check(draw(1, 14, 3, dtype=dtype) @ draw(1, 3, 24, dtype=dtype))
    assert float(values[0, 3] / values[0, 0]) <= 64 * EPS[dtype]


def test_rows_of_very_different_length_keep_all_their_digits() -> None:
    """What squares would lose: the values are right to fp32 each for itself."""
    x = torch.logspace(0, -12, 16, device=DEVICE)[None, :, None] * draw(1, 16, 20, dtype=torch.float32)
    with in_triton():
        values = jacobi(x, floor=1e-30)[1]
    exact = jacobi_reference(x.double())[1]
    assert float(((values - exact) / exact).abs().max()) <= 1e-5


def test_matrices_of_a_batch_do_not_touch_each_other() -> None:
    """One is done at once, one is zero, the third takes its sweeps."""
    x = torch.stack([torch.eye(9, device=DEVICE), torch.zeros(9, 9, device=DEVICE), draw(9, 9, dtype=torch.float32)])
    values = check(x)
    assert relative_error(values[0], torch.ones(9, device=DEVICE)) <= 1e-7
    assert not values[1].any()


def test_integers_on_a_diagonal_are_exact() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = torch.diag(torch.arange(12.0, device=DEVICE))[order][None]
    with in_triton():
        basis, values = jacobi(x)
    assert relative_error(values[0], torch.arange(11, -1, -1, device=DEVICE)) <= 1e-6
    assert bool((basis.abs().sum(2) == 1).all())


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    with in_triton():
        basis, values = jacobi(torch.empty(shape, device=DEVICE))
    assert basis.shape == (shape[0], shape[1], shape[1])
    assert values.shape == shape[:2]
    assert not values.any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_sizes(scale: float) -> None:
    check(scale * draw(1, 6, 8, dtype=torch.float32))


def test_a_view_of_columns() -> None:
    check(draw(2, 24, 7, dtype=torch.float32).mT)


def test_no_convergence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SWEEPS > 20
    monkeypatch.setattr("rankwise.kernels.jacobi.SWEEPS", 1)
    with in_triton(), pytest.raises(torch.linalg.LinAlgError, match="orthogonal"):
        jacobi(draw(1, 20, 20, dtype=torch.float32), half=8)


def test_padding_never_takes_the_place_of_a_row_that_vanished() -> None:
    """Five rows of rank two: what rounding leaves of a squared length may be negative, the padding's is zero."""
    scale = torch.logspace(0, -4, 5, device=DEVICE)[:, None]
    check((scale * draw(5, 2, dtype=torch.float32, seed=2))[None])


@given(st.integers(1, 10), st.integers(1, 12), st.integers(0, 99), st.integers(0, 8))
@settings(max_examples=6, deadline=None)
def test_any_shape_and_condition(rows: int, columns: int, seed: int, decades: int) -> None:
    scale = torch.logspace(0, -decades, rows, device=DEVICE)[:, None]
    check((scale * draw(rows, columns, dtype=torch.float32, seed=seed))[None])
