"""Factors of a weight: the best approximation of every rank in the metric of the curvature.

One-sided (inputs only): minimise `‖(W - Ŵ) C^½‖`; the optimum of rank k is `U_k U_kᵀ W`, with U_k the leading
eigenvectors of `W C Wᵀ`. It equals SVD-LLM's whitening (2403.07378) and needs no inverse of C.
Two-sided: minimise `‖F^½ (W - Ŵ) C^½‖`, whose squared singular values are twice the second-order estimate
of the loss, in nats a token, that a component is worth.
Diagonal: minimise `‖(W - Ŵ) S‖` with `S = diag(E|x_i|^α)`, the metric of ASVD (2312.05821).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rankwise.errors import RankwiseError
from rankwise.kernels.svd import Metric, svd

SIDES = ("one", "two", "diagonal")  # the metrics by name
ALPHA = 0.5  # the exponent of ASVD's scales
FLOOR = 1e-6  # share of the mean magnitude below which no input feature counts
# Added to a metric's eigenvalues, as a share of their mean: dead channels and directions that the
# calibration never saw stay in the problem with a small weight, so no factor is undefined.
DAMPING = 1e-6
REMEASURE = "second moments have no negative directions; measure the curvature again"


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


def factorize(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor | None = None,
    *,
    damping: float = DAMPING,
) -> Factors:
    """Factor a weight in the metric of its curvature; the first k components are the best rank-k approximation.

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
        torch.linalg.LinAlgError: nothing converged.
    """
    return factorize_all([weight], [inputs], [outputs], damping=damping)[0]


@torch.no_grad()
def factorize_all(
    weights: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor | None],
    *,
    damping: float = DAMPING,
) -> list[Factors]:
    """Factor many weights in one call of `kernels.svd`, which decomposes those of one shape together on a GPU.

    Arguments, results and errors are those of `factorize`, one for each weight. Moments that several weights share
    should be the same tensor: then their work is done once.
    """
    known: dict[int, torch.Tensor] = {}

    def metric(matrix: torch.Tensor, what: str, device: torch.device) -> torch.Tensor:
        if id(matrix) not in known:
            known[id(matrix)] = damped(matrix.to(device), what, damping)
        return known[id(matrix)]

    weights = [_finite(w) for w in weights]
    metrics: list[Metric] = []
    for w, c, f in zip(weights, inputs, outputs, strict=True):
        of_inputs = metric(c, "input moments", w.device)
        metrics.append(of_inputs if f is None else (metric(f, "output-gradient moments", w.device), of_inputs))
    try:
        found = svd(weights, metrics)
    except RankwiseError as error:
        raise RankwiseError("second moments", error.value, REMEASURE) from None
    seen = [all(m.any() for m in (c, f) if m is not None) for c, f in zip(inputs, outputs, strict=True)]
    return [
        Factors(f.u.float(), f.v.float(), f.energy if ok else torch.full_like(f.energy, torch.inf))
        for f, ok in zip(found, seen, strict=True)
    ]


def damped(matrix: torch.Tensor, what: str = "second moments", damping: float = DAMPING) -> torch.Tensor:
    """A metric `[n, n]` in fp64, symmetric and positive definite up to rounding: see `DAMPING`.

    Raises:
        RankwiseError: NaN, Inf or a truly indefinite matrix; `what` names it.
    """
    m = matrix.to(dtype=torch.float64)
    if not torch.isfinite(m).all():
        raise RankwiseError(what, "NaN or Inf", "finite numbers are needed; measure the curvature again")
    m = (m + m.T) / 2
    mean = float(m.diagonal().mean())
    if mean < 0 or (mean == 0 and m.any()):
        raise RankwiseError(what, f"indefinite (mean of the diagonal {mean:.1e})", REMEASURE)
    m.diagonal().add_(damping * mean if mean > 0 else 1.0)  # never seen at all: the plain metric
    return m


def definite(matrix: torch.Tensor) -> torch.Tensor:
    """`damped`, and positive definite also where sums in fp32 have left negative directions."""
    m = damped(matrix)
    if int(torch.linalg.cholesky_ex(m).info):
        values, vectors = torch.linalg.eigh(m)
        m = (vectors * values.clamp_min(DAMPING * float(m.diagonal().mean()))) @ vectors.mT
    return m


@torch.no_grad()
def spectrum(weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The energies of `factorize` without the factors, falling, `[r]` fp64.

    Args:
        weight: W `[m, n]`.
        inputs: C `[n, n]` fp64, positive definite.
        outputs: F `[m, m]` fp64, positive definite.
    """
    left, right = (torch.linalg.cholesky(metric) for metric in (outputs, inputs))
    scaled = left.mT @ weight.double() @ right
    gram = scaled @ scaled.T if len(scaled) <= scaled.shape[1] else scaled.T @ scaled
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


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
    w = _finite(weight).double()
    sizes = magnitudes.to(device=w.device, dtype=torch.float64)
    if not torch.isfinite(sizes).all() or (sizes < 0).any():
        raise RankwiseError("input magnitudes", "NaN, Inf or negative", "measure the curvature again")
    seen = bool(sizes.any())
    scale = sizes.clamp_min(FLOOR * float(sizes.mean())).pow(alpha) if seen else torch.ones_like(sizes)
    [found] = svd([w * scale])
    return _balanced(found.u, found.v / scale, found.energy if seen else torch.full_like(found.energy, torch.inf))


def _finite(weight: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(weight).all():
        raise RankwiseError("weight", "NaN or Inf", "finite numbers are needed")
    return weight


def _balanced(u: torch.Tensor, v: torch.Tensor, energy: torch.Tensor) -> Factors:
    """Give each component's two vectors the same norm, so that neither overflows in 16 bits."""
    scale = (v.norm(dim=1) / u.norm(dim=0).clamp_min(1e-300)).sqrt()
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    return Factors((u * scale).float(), (v / scale[:, None]).float(), energy)
