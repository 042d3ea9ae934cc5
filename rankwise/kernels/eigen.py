"""Ways to the same answer: the left singular vectors of `X`, given as `X Xᵀ = R M Rᵀ`.

Gram and eigh: exact as long as the wanted singular values are not small against the largest, for the Gram matrix
squares them. Jacobi on X itself: no square. Refinement: Jacobi on `Q X` with Q from a cheap eigh, nearly done at once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from rankwise.errors import RankwiseError
from rankwise.kernels.jacobi import jacobi

INDEFINITE = 1e-3  # a negative eigenvalue beyond this share of the largest is no rounding error
FLOOR = 1e-12  # share of the largest eigenvalue that directions which a metric lacks count in its root
DEFINITE = "a symmetric positive semi-definite matrix"
REFINED = 1e-8  # rows that refinement leaves oblique are this short, as a share of the norm of X


@dataclass(frozen=True)
class Problem:
    """`R M Rᵀ` with entries of size about 1.

    Args:
        rows: R `[s, l]` fp64, s <= l.
        weight: M `[l, l]` fp64, symmetric positive semi-definite, or None for the identity.
    """

    rows: torch.Tensor
    weight: torch.Tensor | None = None

    def gram(self, dtype: torch.dtype) -> torch.Tensor:
        """`R M Rᵀ` `[s, s]`, exactly symmetric, summed in `dtype`."""
        rows = self.rows.to(dtype)
        product = (rows if self.weight is None else rows @ self.weight.to(dtype)) @ rows.mT
        return (product + product.mT) / 2

    def operand(self) -> torch.Tensor:
        """An X `[s, l]` in fp64 with `X Xᵀ = R M Rᵀ`."""
        return self.rows if self.weight is None else self.rows @ root(self.weight, "metric")[0]


@dataclass(frozen=True)
class Spectrum:
    """`R M Rᵀ = basisᵀ diag(energy) basis`.

    Args:
        basis: `[s, s]`, orthogonal, a vector a row; fp32 or fp64.
        energy: `[s]` fp64, falling, not negative.
    """

    basis: torch.Tensor
    energy: torch.Tensor


Algorithm = Callable[[Sequence[Problem], torch.dtype, int], list[Spectrum]]  # problems of one shape, dtype, streams


def eigh(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Spectrum]:
    """Gram matrix and eigendecomposition of one problem after the other, several at a time on a GPU."""
    return on_streams([partial(_from_gram, p, dtype, dtype) for p in problems], problems[0].rows, streams)


def mixed(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Spectrum]:
    """A Gram matrix in `dtype`, decomposed in fp64: in fp32 it is eigh that loses most."""
    return on_streams([partial(_from_gram, p, dtype, torch.float64) for p in problems], problems[0].rows, streams)


def batched(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Spectrum]:
    """The same with one call for all Gram matrices."""
    return _spectra(torch.stack([p.gram(dtype) for p in problems]))


def rotations(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Spectrum]:
    """One-sided Jacobi on all X at once."""
    basis, values = jacobi(torch.stack([p.operand().to(dtype) for p in problems]))
    return [Spectrum(b, v.double().square()) for b, v in zip(basis, values, strict=True)]


def refined(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Spectrum]:
    """eigh in fp32, then Jacobi in fp32 on the rows of `Q X`, formed in fp64: so short rows keep their digits.

    Its vectors are exact to fp32, hence good for σ_k as far as `eps σ_1` is small against it.
    """
    rough = [found.basis.double() for found in eigh(problems, torch.float32, streams)]
    near = torch.stack([q @ p.operand() for q, p in zip(rough, problems, strict=True)])
    basis, values = jacobi(near.to(dtype), floor=REFINED)
    return [
        Spectrum(_orthogonal(b.double() @ q), v.double().square()) for b, q, v in zip(basis, rough, values, strict=True)
    ]


def direct(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Spectrum]:
    """The library's singular value decomposition of X."""
    u, values, _ = torch.linalg.svd(torch.stack([p.operand().to(dtype) for p in problems]), full_matrices=False)
    return [Spectrum(b.mT, v.double().square()) for b, v in zip(u, values, strict=True)]


def root(metric: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """L and its inverse with `L Lᵀ = metric`; directions that the metric lacks count `FLOOR`, so that L has an inverse.

    Raises:
        RankwiseError: indefinite.
    """
    lower, info = torch.linalg.cholesky_ex(metric)
    pivots = lower.diagonal()
    if int(info) == 0 and bool(pivots.min() ** 2 >= FLOOR * pivots.max() ** 2):
        unit = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
        return lower, torch.linalg.solve_triangular(lower, unit, upper=False)
    values, vectors = torch.linalg.eigh(metric)
    require_semidefinite(values, what)
    values = values.clamp_min(FLOOR * float(values[-1])).sqrt()
    return vectors * values, (vectors / values).mT


def require_semidefinite(values: torch.Tensor, what: str) -> None:
    """Raise a RankwiseError if eigenvalues `[..., n]` in rising order start far below zero."""
    low, high = values[..., 0].min(), values[..., -1].max()
    if bool(low < -INDEFINITE * high.abs()):
        raise RankwiseError(what, f"indefinite (eigenvalues from {float(low):.1e} to {float(high):.1e})", DEFINITE)


def on_streams(jobs: Sequence[Callable[[], Spectrum]], example: torch.Tensor, streams: int) -> list[Spectrum]:
    """Run jobs on several CUDA streams, each driven by a thread, for one eigh leaves most of a GPU idle.

    Elsewhere, or with one job, it is a plain loop. All is ordered after what the current stream holds, and before what
    it gets next.
    """
    if not example.is_cuda or len(jobs) == 1 or streams == 1:
        return [job() for job in jobs]
    here = torch.cuda.current_stream(example.device)
    lanes = [torch.cuda.Stream(example.device) for _ in range(min(streams, len(jobs)))]
    for lane in lanes:
        lane.wait_stream(here)

    def drive(lane: torch.cuda.Stream, mine: Sequence[Callable[[], Spectrum]]) -> list[Spectrum]:
        with torch.no_grad(), torch.cuda.stream(lane):
            return [job() for job in mine]

    with ThreadPoolExecutor(len(lanes)) as pool:
        drives = [pool.submit(drive, lane, jobs[i :: len(lanes)]) for i, lane in enumerate(lanes)]
        done = [drive.result() for drive in drives]
    for lane in lanes:
        here.wait_stream(lane)
    found = [done[i % len(lanes)][i // len(lanes)] for i in range(len(jobs))]
    for spectrum in found:  # made in a lane's memory, read and freed in this one's order
        spectrum.basis.record_stream(here)
        spectrum.energy.record_stream(here)
    return found


def _from_gram(problem: Problem, summed: torch.dtype, decomposed: torch.dtype) -> Spectrum:
    return _spectra(problem.gram(summed).to(decomposed)[None])[0]


def _spectra(grams: torch.Tensor) -> list[Spectrum]:
    """Of symmetric matrices `[b, s, s]`."""
    trace = grams.diagonal(dim1=1, dim2=2).sum(1)
    scale = torch.where(trace > 0, trace, torch.ones_like(trace))
    values, vectors = torch.linalg.eigh(grams / scale[:, None, None])
    require_semidefinite(values, "metric")
    energy = values.double().flip(1).clamp_min(0) * scale.double()[:, None]
    return [Spectrum(basis, e) for basis, e in zip(vectors.flip(2).mT, energy, strict=True)]


def _orthogonal(basis: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrix, to second order in the distance."""
    return 1.5 * basis - 0.5 * (basis @ basis.mT) @ basis
