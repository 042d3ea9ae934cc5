"""Factors of a weight: the best approximation of every rank in the metric of the curvature.

One-sided (inputs only): minimise `‖(W - Ŵ) C^½‖`; the optimum of rank k is `U_k U_kᵀ W`, with U_k the leading
eigenvectors of `W C Wᵀ`. It equals SVD-LLM's whitening (2403.07378) and needs no inverse of C.
Two-sided: minimise `‖F^½ (W - Ŵ) C^½‖`, whose squared singular values are twice the second-order estimate
of the loss, in nats a token, that a component is worth.
Diagonal: minimise `‖(W - Ŵ) S‖` with `S = diag(E|x_i|^α)`, the metric of ASVD (2312.05821).
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from rankwise.errors import RankwiseError

SIDES = ("one", "two", "diagonal")  # the metrics by name
ALPHA = 0.5  # the exponent of ASVD's scales
FLOOR = 1e-6  # share of the mean magnitude below which no input feature counts
# Added to a metric's eigenvalues, as a share of their mean: dead channels and directions that the
# calibration never saw stay in the problem with a small weight, so no factor is undefined.
DAMPING = 1e-6
REMEASURE = "second moments have no negative directions; measure the curvature again"
INDEFINITE = 1e-3  # a negative eigenvalue beyond this share of the largest is no rounding error


@dataclass
class Factors:
    """`W = u v` at full rank r = min(m, n), components in falling order of worth.

    Args:
        u: `[m, r]`.
        v: `[r, n]`.
        energy: `[r]` fp64, squared singular values in the metric.
    """

    u: torch.Tensor
    v: torch.Tensor
    energy: torch.Tensor


@torch.no_grad()
def factorize(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor | None = None,
    *,
    damping: float = DAMPING,
) -> Factors:
    """Factor a weight in the metric of its curvature; the first k components are the best rank-k approximation.

    The smaller side is diagonalised: at most one square root and one eigendecomposition of size min(m, n), in fp64.

    Args:
        weight: W `[m, n]`, any float dtype, finite.
        inputs: C `[n, n]`, symmetric positive semi-definite up to rounding; may be singular or zero.
        outputs: F `[m, m]`, likewise, or None for the one-sided metric.
        damping: see `DAMPING`.

    Returns:
        Factors in fp32 on the device of `weight`. Where a moment is all zero (the calibration never reached the
        layer) that side's metric is the identity, and the energy is infinite: no component's worth is known.

    Raises:
        RankwiseError: NaN, Inf or a truly indefinite matrix.
    """
    w = weight.double()
    c = _checked(inputs, "input moments", w.device, damping)
    f = None if outputs is None else _checked(outputs, "output-gradient moments", w.device, damping)
    if w.shape[0] <= w.shape[1]:
        root, inverse = _roots(f, "output-gradient moments")
        left = w if root is None else root @ w
        energy, basis = _leading(left @ c @ left.T)
        u, v = (basis if inverse is None else inverse @ basis), basis.T @ left
    else:
        root, inverse = _roots(c, "input moments")
        assert root is not None
        assert inverse is not None
        right = w @ root
        energy, basis = _leading(right.T @ (right if f is None else f @ right))
        u, v = right @ basis, basis.T @ inverse
    if not all(m.any() for m in (inputs, outputs) if m is not None):
        energy = torch.full_like(energy, torch.inf)
    return _balanced(u, v, energy)


@torch.no_grad()
def factorize_diagonal(weight: torch.Tensor, magnitudes: torch.Tensor, *, alpha: float = ALPHA) -> Factors:
    """Factor a weight in ASVD's metric (2312.05821): the leading part of the SVD of `W S`, times `S⁻¹`.

    Args:
        weight: W `[m, n]`, any float dtype, finite.
        magnitudes: E|x_i| `[n]`, not negative. One below `FLOOR` times their mean counts as that much, so that dead
            features stay in the problem with a small weight and no factor is undefined.
        alpha: `S = diag(magnitudes ^ alpha)`.

    Returns:
        Factors as from `factorize`: in fp32, energy the squared singular values of `W S`. If all magnitudes are zero
        the metric is the identity, and the energy is infinite.

    Raises:
        RankwiseError: NaN, Inf or a negative magnitude.
    """
    w = weight.double()
    sizes = magnitudes.to(device=w.device, dtype=torch.float64)
    if not torch.isfinite(sizes).all() or (sizes < 0).any():
        raise RankwiseError("input magnitudes", "NaN, Inf or negative", "measure the curvature again")
    seen = bool(sizes.any())
    scale = sizes.clamp_min(FLOOR * float(sizes.mean())).pow(alpha) if seen else torch.ones_like(sizes)
    scaled = w * scale
    if w.shape[0] <= w.shape[1]:
        energy, basis = _leading(scaled @ scaled.T)
        u, v = basis, basis.T @ w
    else:
        energy, basis = _leading(scaled.T @ scaled)
        u, v = scaled @ basis, basis.T / scale
    return _balanced(u, v, energy if seen else torch.full_like(energy, torch.inf))


def pivot_form(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewrite `u v` of rank k as k of its own rows and a rule for the others (PIFA, 2501.19090).

    Rows are chosen by QR with column pivoting, which keeps the coefficients near 1 in size.

    Args:
        u: `[m, k]`, k < m.
        v: `[k, n]`.

    Returns:
        index `[m]` int32 (see `kernels.pivot_linear`), basis `[k, n]` and coeff `[m - k, k]`, both fp32.
    """
    rank = u.shape[1]
    rows = u.double().cpu().numpy()
    r, order = scipy.linalg.qr(rows.T, mode="r", pivoting=True)
    if abs(r[rank - 1, rank - 1]) > 1e-12 * abs(r[0, 0]):
        coeff = scipy.linalg.solve_triangular(r[:rank, :rank], r[:rank, rank:]).T
    else:  # u has fewer than k independent columns: any exact combination will do
        coeff = np.linalg.lstsq(rows[order[:rank]].T, rows[order[rank:]].T, rcond=None)[0].T
    index = np.empty(len(rows), dtype=np.int32)
    index[order] = np.arange(len(rows), dtype=np.int32)
    basis = torch.from_numpy(rows[order[:rank]]) @ v.double().cpu()
    return torch.from_numpy(index), basis.float(), torch.from_numpy(np.ascontiguousarray(coeff)).float()


def _checked(matrix: torch.Tensor, what: str, device: torch.device, damping: float) -> torch.Tensor:
    m = matrix.to(device=device, dtype=torch.float64)
    if not torch.isfinite(m).all():
        raise RankwiseError(what, "NaN or Inf", "finite numbers are needed; measure the curvature again")
    m = (m + m.T) / 2
    mean = float(m.diagonal().mean())
    if mean < 0 or (mean == 0 and m.any()):
        raise RankwiseError(what, f"indefinite (mean of the diagonal {mean:.1e})", REMEASURE)
    m.diagonal().add_(damping * mean if mean > 0 else 1.0)  # never seen at all: the plain metric
    return m


def _leading(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues in falling order, negative rounding errors cut off, and their vectors."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    _require_semidefinite(values, "second moments")
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _roots(matrix: torch.Tensor | None, what: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Symmetric square root and its inverse; (None, None) for the identity."""
    if matrix is None:
        return None, None
    values, vectors = torch.linalg.eigh(matrix)
    _require_semidefinite(values, what)
    root = values.clamp_min(DAMPING * DAMPING * float(values[-1])).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _require_semidefinite(values: torch.Tensor, what: str) -> None:
    lowest, largest = float(values[0]), float(values[-1])
    if lowest < -INDEFINITE * abs(largest):
        reason = f"indefinite (eigenvalues from {lowest:.1e} to {largest:.1e})"
        raise RankwiseError(what, reason, REMEASURE)


def _balanced(u: torch.Tensor, v: torch.Tensor, energy: torch.Tensor) -> Factors:
    """Give each component's two vectors the same norm, so that neither overflows in 16 bits."""
    scale = (v.norm(dim=1) / u.norm(dim=0).clamp_min(1e-300)).sqrt()
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    return Factors((u * scale).float(), (v / scale[:, None]).float(), energy)
