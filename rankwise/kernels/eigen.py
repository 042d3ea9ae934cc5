"""Ways to the same answer: the left singular vectors of `X`, given as `X Xᵀ = R M Rᵀ`.

Gram and eigh: exact as long as the wanted singular values are not small against the largest, for the Gram matrix
squares them. Jacobi on X itself: no square. Refinement: Jacobi on `Q X` with Q from a cheap eigh, nearly done at once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

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


Job = Callable[[], list[Spectrum]]
# Problems of one shape, dtype, streams; the jobs' spectra, one job's after another's, are those of the problems.
Algorithm = Callable[[Sequence[Problem], torch.dtype, int], list[Job]]


def eigh(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Job]:
    """Gram matrix and eigendecomposition of each problem by itself, so that a GPU may have several at a time."""
    return [partial(_from_gram, p, dtype, dtype) for p in problems]


def mixed(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Job]:
    """A Gram matrix in `dtype`, decomposed in fp64: in fp32 it is eigh that loses most."""
    return [partial(_from_gram, p, dtype, torch.float64) for p in problems]


def batched(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Job]:
    """The same with one call for all Gram matrices."""
    return [lambda: _spectra(torch.stack([p.gram(dtype) for p in problems]))]


def rotations(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Job]:
    """One-sided Jacobi on all X at once."""
    return [partial(_rotated, problems, dtype)]


def refined(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Job]:
    """eigh in fp32, then Jacobi in fp32 on the rows of `Q X`, formed in fp64: so short rows keep their digits.

    Its vectors are exact to fp32, hence good for σ_k as far as `eps σ_1` is small against it.
    """
    return [partial(_refined, problems, dtype, streams)]


def direct(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Job]:
    """The library's singular value decomposition of X."""
    return [partial(_direct, problems, dtype)]


def _rotated(problems: Sequence[Problem], dtype: torch.dtype) -> list[Spectrum]:
    basis, values = jacobi(torch.stack([p.operand().to(dtype) for p in problems]))
    return [Spectrum(b, v.double().square()) for b, v in zip(basis, values, strict=True)]


def _refined(problems: Sequence[Problem], dtype: torch.dtype, streams: int) -> list[Spectrum]:
    jobs = eigh(problems, torch.float32, streams)
    found = on_streams(jobs, [1.0] * len(jobs), problems[0].rows.device, streams)
    rough = [spectrum.basis.double() for (spectrum,) in found]
    near = torch.stack([q @ p.operand() for q, p in zip(rough, problems, strict=True)])
    basis, values = jacobi(near.to(dtype), floor=REFINED)
    return [
        Spectrum(_orthogonal(b.double() @ q), v.double().square()) for b, q, v in zip(basis, rough, values, strict=True)
    ]


def _direct(problems: Sequence[Problem], dtype: torch.dtype) -> list[Spectrum]:
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


def on_streams(jobs: Sequence[Job], costs: Sequence[float], device: torch.device, streams: int) -> list[list[Spectrum]]:
    """Run jobs on several CUDA streams, each driven by a thread, for one eigh leaves most of a GPU idle.

    Elsewhere, or with one job, it is a plain loop. All is ordered after what the current stream holds, and before what
    it gets next.

    Args:
        jobs: on one device.
        costs: of each, in any unit.
        device: theirs.
        streams: at most.
    """
    if device.type != "cuda" or len(jobs) == 1 or streams == 1:
        return [job() for job in jobs]
    here, mine = torch.cuda.current_stream(device), shared_out(costs, min(streams, len(jobs)))
    lanes = [torch.cuda.Stream(device) for _ in mine]
    for lane in lanes:
        lane.wait_stream(here)

    def drive(lane: torch.cuda.Stream, numbers: Sequence[int]) -> list[list[Spectrum]]:
        with torch.no_grad(), torch.cuda.stream(lane):
            return [jobs[i]() for i in numbers]

    with ThreadPoolExecutor(len(lanes)) as pool:
        done = [drive.result() for drive in [pool.submit(drive, *each) for each in zip(lanes, mine, strict=True)]]
    for lane in lanes:
        here.wait_stream(lane)
    found = put_back(mine, done)
    for spectrum in chain.from_iterable(found):  # made in a lane's memory, read and freed in this one's order
        spectrum.basis.record_stream(here)
        spectrum.energy.record_stream(here)
    return found


def shared_out(costs: Sequence[float], lanes: int) -> list[list[int]]:
    """Which jobs each lane does: the costliest first, each to the lane that has least to do so far."""
    mine: list[list[int]] = [[] for _ in range(lanes)]
    loads = [0.0] * lanes
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        lane = loads.index(min(loads))
        mine[lane].append(i)
        loads[lane] += costs[i]
    return mine


def put_back(mine: Sequence[Sequence[int]], done: Sequence[Sequence[Any]]) -> list[Any]:
    """What the lanes have done, in the order of the jobs."""
    found = {
        i: result
        for numbers, results in zip(mine, done, strict=True)
        for i, result in zip(numbers, results, strict=True)
    }
    return [found[i] for i in range(len(found))]


def _from_gram(problem: Problem, summed: torch.dtype, decomposed: torch.dtype) -> list[Spectrum]:
    return _spectra(problem.gram(summed).to(decomposed)[None])


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
