"""Singular value decompositions of many matrices at once, in the metric of the data that they meet.

The best approximation of rank k in `‖Kᵀ (W - Ŵ) L‖_F`, where `K Kᵀ = F` and `L Lᵀ = C`, is `Ŵ = K⁻ᵀ Q Qᵀ Kᵀ W` with Q
the leading k left singular vectors of `Kᵀ W L`. Those are eigenvectors of `Kᵀ W C Wᵀ K`, so C is never factored and may
be singular (for F the identity: Swift-SVD, 2604.01609; with a factor of C it is SVD-LLM, 2403.07378). A tall W is
transposed first, so that the smaller side is decomposed.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from rankwise.errors import RankwiseError
from rankwise.kernels.drivers import DRIVERS, decompose
from rankwise.kernels.eigen import DEFINITE, Problem, Spectrum, root
from rankwise.kernels.precision import full_precision

DEPTH = 1e-6
STREAMS = 3

Metric = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True)
class Svd:
    """`W = u v`; the first k components are the best approximation of rank k in the metric.

    Args:
        u: `[m, k]`, each column as long as v's row of the same number, so that both fit in 16 bits. fp64 for W in fp64,
            else fp32.
        v: `[k, n]`, likewise. Without a metric `u = U Σ^½` and `v = Σ^½ Vᵀ`.
        energy: `[min(m, n)]` fp64, falling: all squared singular values in the metric.
        driver: what computed it, a name of `drivers.DRIVERS`.
    """

    u: torch.Tensor
    v: torch.Tensor
    energy: torch.Tensor
    driver: str


@torch.no_grad()
def svd(
    matrices: Sequence[torch.Tensor],
    metric: Metric | list[Metric] = None,
    *,
    rank: int | None = None,
    depth: float = DEPTH,
    driver: str = "auto",
    streams: int = STREAMS,
) -> list[Svd]:
    """Decompose matrices; those of one shape together, on a GPU with the driver that was measured to be fastest.

    Args:
        matrices: W `[m, n]` each, of any float dtype. One fp64 copy is made of all that have the same
            shape, on a GPU of all.
        metric: None, the inputs' second moments C `[n, n]`, or `(F, C)` with the output gradients' F `[m, m]`; a list
            has one for each matrix. A metric that several matrices share should be the same tensor: then its work is
            done once. Both need be positive semi-definite only, but W is in the null space of neither F (m <= n) nor C
            (m > n) without a loss of digits: directions they lack count 1e-12 of their largest.
        rank: return, and care for, this many components only. Where σ_rank / σ_1 is large enough, fp32 will do.
        depth: components below this share of σ_1 need not be resolved.
        driver: a name of `drivers.DRIVERS` to force one.
        streams: of the GPU, each with its thread.

    Returns:
        One result for each matrix, in order, on its device. The error in the metric of the first k components
        exceeds the least possible one by at most 3e-4 of it where a driver in fp32 was chosen, else by 1e-6 of it, down
        to `depth`.

    Raises:
        RankwiseError: NaN, Inf, a wrong shape, or a metric that is zero or indefinite.
        torch.linalg.LinAlgError: nothing converged.
    """
    metrics = metric if isinstance(metric, list) else [metric] * len(matrices)
    _check_options(matrices, metrics, rank, driver)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (w, of_w) in enumerate(zip(matrices, metrics, strict=True)):
        groups[(w.device, min(w.shape), max(w.shape), _sides(w, of_w)[1] is None)].append(i)
    found: dict[int, Svd] = {}
    for together in _at_once(list(groups.values()), matrices):
        with full_precision(matrices[together[0][0]].device):
            shared: dict[int, _Side] = {}
            tasks = [[_prepare(matrices[i], metrics[i], i, shared) for i in indices] for indices in together]
            problems = [[task.problem for task in group] for group in tasks]
            spectra = decompose(problems, rank=rank, depth=depth, driver=driver, streams=streams)
            for i, task, (spectrum, name) in zip(*(chain(*part) for part in (together, tasks, spectra)), strict=True):
                dtype = torch.promote_types(matrices[i].dtype, torch.float32)
                found[i] = task.factors(spectrum, rank, dtype, name)
    return [found[i] for i in range(len(matrices))]


def _at_once(groups: list[list[int]], matrices: Sequence[torch.Tensor]) -> list[list[list[int]]]:
    """All shapes of a GPU share its streams; elsewhere one shape comes after another, which takes less memory."""
    by_device: dict[object, list[list[int]]] = defaultdict(list)
    for indices in groups:
        device = matrices[indices[0]].device
        by_device[device if device.type == "cuda" else indices[0]].append(indices)
    return list(by_device.values())


class _Side:
    """A metric of one side, divided by the mean of its diagonal."""

    def __init__(self, metric: torch.Tensor, what: str) -> None:
        wide = metric.double()
        wide = (wide + wide.mT) / 2
        self.what, self.mean = what, float(wide.diagonal().mean())
        if not bool(torch.isfinite(wide).all()):
            raise RankwiseError(what, "NaN or Inf", "finite numbers")
        if self.mean <= 0:
            kind = f"indefinite (mean of the diagonal {self.mean:.1e})" if bool(wide.any()) else "zero"
            raise RankwiseError(what, kind, DEFINITE)
        self.matrix = wide / self.mean
        self._root: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def root(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `eigen.root`."""
        self._root = self._root or root(self.matrix, self.what)
        return self._root


@dataclass(frozen=True)
class _Task:
    """A matrix on its way: scaled, in the metric of its shorter side, and standing so that this side is its rows."""

    problem: Problem
    inverse: torch.Tensor | None
    turned: bool
    scale: float
    means: float

    def factors(self, found: Spectrum, rank: int | None, dtype: torch.dtype, driver: str) -> Svd:
        """Back to the matrix itself."""
        basis = found.basis[:rank]
        v = basis @ self.problem.rows.to(basis.dtype)
        u = basis.mT if self.inverse is None else self.inverse.mT @ basis.mT.to(self.inverse.dtype)
        long_v, long_u = v.double().norm(dim=1) * self.scale, u.double().norm(dim=0)
        ratio = torch.where(long_v > 0, (long_v / long_u).sqrt(), 1)
        u, v = (u * ratio).to(dtype), (v.double() * (self.scale / ratio)[:, None]).to(dtype)
        energy = found.energy * (self.scale * self.scale * self.means)
        return Svd(v.mT.contiguous(), u.mT.contiguous(), energy, driver) if self.turned else Svd(u, v, energy, driver)


def _sides(w: torch.Tensor, metric: Metric) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Metrics of the shorter and of the longer side."""
    f, c = metric if isinstance(metric, tuple) else (None, metric)
    return (f, c) if w.shape[0] <= w.shape[1] else (c, f)


def _prepare(w: torch.Tensor, metric: Metric, index: int, shared: dict[int, _Side]) -> _Task:
    """The problem that a matrix and its metric pose."""
    if not bool(torch.isfinite(w).all()):
        raise RankwiseError(f"matrix {index}", "NaN or Inf", "finite numbers")
    turned = w.shape[0] > w.shape[1]
    rows = w.double().mT if turned else w.double()
    scale = float(rows.abs().max()) or 1.0
    sides: list[_Side | None] = []
    for size, given in zip(rows.shape, _sides(w, metric), strict=True):
        if given is not None and given.shape != (size, size):
            raise RankwiseError(f"metric of matrix {index}", str(tuple(given.shape)), str((size, size)))
        if given is not None and id(given) not in shared:
            shared[id(given)] = _Side(given.to(w.device), f"metric of matrix {index}")
        sides.append(None if given is None else shared[id(given)])
    short, long = sides
    means = (short.mean if short else 1.0) * (long.mean if long else 1.0)
    factor, inverse = short.root if short else (None, None)
    rows = rows / scale if factor is None else factor.mT @ (rows / scale)
    return _Task(Problem(rows, long.matrix if long else None), inverse, turned, scale, means)


def _check_options(matrices: Sequence[torch.Tensor], metrics: Sequence[Metric], rank: int | None, driver: str) -> None:
    if len(metrics) != len(matrices):
        raise RankwiseError("metric", f"{len(metrics)} of them", f"one, or one for each of {len(matrices)} matrices")
    for i, w in enumerate(matrices):
        if w.ndim != 2 or not w.numel() or not w.is_floating_point():
            raise RankwiseError(
                f"matrix {i}", f"{w.dtype} {tuple(w.shape)}", "two dimensions, floating point, not empty"
            )
    if rank is not None and rank < 1:
        raise RankwiseError("rank", rank, "at least 1")
    if driver != "auto" and driver not in DRIVERS:
        raise RankwiseError("driver", driver, f"auto, {', '.join(DRIVERS)}")
