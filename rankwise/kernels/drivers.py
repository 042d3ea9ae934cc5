"""Which algorithm decomposes a batch: the fastest on the device at hand, by measurement, that resolves what is wanted.

Published timings contradict each other from card to card and from size to size, so none is built in. The first batch
of a shape on a GPU is decomposed by every candidate, and the times are kept in the user's cache folder.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter

import torch

from rankwise.errors import RankwiseError
from rankwise.files import cache_folder, read_json, write_json
from rankwise.kernels.backend import KERNEL_ERRORS, power_of_two
from rankwise.kernels.eigen import (
    Algorithm,
    Job,
    Problem,
    Spectrum,
    batched,
    direct,
    eigh,
    mixed,
    on_streams,
    refined,
    rotations,
)

PASSES = {torch.float32: 1e-4, torch.float64: 1e-10}  # largest entry of |Q Qᵀ - I|, and relative error of products
PROBES = 4
MEDIUM = 1024  # rows beyond which one call for a batch, and drivers of last resort, are not measured
FAILED = 1e9  # seconds
# No convergence, no memory, a size that a library refuses, a kernel that does not fit.
FAILURES: tuple[type[Exception], ...] = (RuntimeError, *KERNEL_ERRORS)
HOPELESS = 4  # times the best one's seconds, after which a driver is not run again


@dataclass(frozen=True)
class Driver:
    """An algorithm in a precision.

    Args:
        run: makes jobs of problems of one shape.
        dtype: of its arithmetic.
        depth: the smallest σ_k / σ_1 at which its leading k vectors are as good as the best ones: the excess of the
            error is within 3e-4 of it in fp32, 1e-6 in fp64.
        largest: number of rows up to which it is a candidate.
    """

    run: Algorithm
    dtype: torch.dtype
    depth: float
    largest: int = 1 << 30


LAST = "svd"
DRIVERS = {
    "eigh32": Driver(eigh, torch.float32, 1e-2),
    "batched32": Driver(batched, torch.float32, 1e-2, MEDIUM),
    "mixed": Driver(mixed, torch.float32, 1e-3),
    "jacobi32": Driver(rotations, torch.float32, 1e-4),
    "refined": Driver(refined, torch.float32, 3e-5),
    "eigh64": Driver(eigh, torch.float64, 1e-6),
    "batched64": Driver(batched, torch.float64, 1e-6, MEDIUM),
    "jacobi64": Driver(rotations, torch.float64, 0.0, MEDIUM),
    LAST: Driver(direct, torch.float64, 0.0, MEDIUM),
}
ON_CPU = ("eigh32", "mixed", "eigh64", LAST)  # by falling speed; LAPACK does the work, whoever calls it
_times: dict[str, dict[str, float]] = {}


def decompose(
    groups: Sequence[Sequence[Problem]], *, rank: int | None, depth: float, driver: str, streams: int
) -> list[list[tuple[Spectrum, str]]]:
    """Decompose groups of problems, each with the name of the driver whose result passed; all share the streams.

    Args:
        groups: at least one problem each, all of one shape and with or without a weight; all on one device.
        rank: only so many leading vectors matter; None if all do.
        depth: what is below this share of σ_1 does not matter.
        driver: a name of `DRIVERS`, or `auto`: the fastest one; where σ_rank / σ_1 turns out to be beyond its depth, or
            its result fails a check, or it finds no memory, the next one that reaches deeper. If all vectors matter,
            only drivers that reach `depth` are asked.

    Raises:
        torch.linalg.LinAlgError: no driver converged.
        torch.OutOfMemoryError: that was the last driver's trouble.
    """
    wanted, auto = depth if rank is None else None, driver == "auto"
    searches = [_Search(group, ranking(group, wanted, streams) if auto else [driver]) for group in groups]
    while open_ := [search for search in searches if search.todo]:
        jobs = [search.jobs(streams) for search in open_]
        costs = [search.cost / len(mine) for search, mine in zip(open_, jobs, strict=True) for _ in mine]
        done = iter(on_streams([*chain(*jobs)], costs, open_[0].problems[0].rows.device, streams))
        for search, mine in zip(open_, jobs, strict=True):
            spectra = [spectrum for _ in mine for spectrum in next(done)]
            search.judge(spectra, lambda s, reaches: not auto or max(depth, _depth_at(s, rank)) >= reaches)
    return [[search.found[i] for i in range(len(search.problems))] for search in searches]


class _Search:
    """Problems of one shape, and the drivers that are still to be tried on them."""

    def __init__(self, problems: Sequence[Problem], names: Sequence[str]) -> None:
        self.problems, self.names, self.name, self.reached = problems, list(names), "", 2.0
        self.todo, self.found = list(range(len(problems))), dict[int, tuple[Spectrum, str]]()
        self.failed = False  # the driver that has just run
        self.failure: Exception = torch.linalg.LinAlgError("no driver reaches so deep")

    @property
    def cost(self) -> float:
        """Of all that is left to do, in multiplications of some kind."""
        return float(len(self.todo) * len(self.problems[0].rows) ** 3)

    def jobs(self, streams: int) -> list[Job]:
        """Those of the next driver that reaches deeper than the last one did."""
        self.names = [name for name in self.names if DRIVERS[name].depth < self.reached]
        if not self.names:
            raise self.failure
        self.name, *self.names = self.names
        return [partial(self._tried, job) for job in _jobs(self.name, [self.problems[i] for i in self.todo], streams)]

    def _tried(self, job: Job) -> list[Spectrum]:
        """The job's spectra, or none and a note of what went wrong."""
        try:
            return job()
        except torch.linalg.LinAlgError as error:
            self.failure = torch.linalg.LinAlgError(f"{self.name}: {error}")
        except torch.OutOfMemoryError as error:
            self.failure = error.with_traceback(None)  # whose frames hold what fills the memory
        self.failed = True
        return []

    def judge(self, spectra: Sequence[Spectrum], deep_enough: Callable[[Spectrum, float], bool]) -> None:
        """Keep what is sound and deep enough of the last driver's results."""
        if self.failed:
            self.failed = False
            return
        driver = DRIVERS[self.name]
        for i, spectrum in zip(self.todo, spectra, strict=True):
            if not _is_sound(spectrum, self.problems[i], driver.dtype):
                reason = "the vectors are not orthogonal, or do not give back the matrix"
                self.failure = torch.linalg.LinAlgError(f"{self.name}: {reason}")
            elif deep_enough(spectrum, driver.depth):
                self.found[i] = spectrum, self.name
        self.todo, self.reached = [i for i in self.todo if i not in self.found], driver.depth


def _jobs(name: str, problems: Sequence[Problem], streams: int) -> list[Job]:
    return DRIVERS[name].run(problems, DRIVERS[name].dtype, streams)


def ranking(problems: Sequence[Problem], depth: float | None, streams: int) -> list[str]:
    """Drivers for problems of one shape, the fastest first, then the last resort.

    Args:
        depth: only drivers that reach it; None admits all.
        streams: of the GPU. There, times that are not known yet are measured with these very problems.
    """
    rows = problems[0].rows
    able = [name for name, d in DRIVERS.items() if len(rows) <= d.largest and (depth is None or d.depth <= depth)]
    if not rows.is_cuda:
        return [*(name for name in ON_CPU[:-1] if name in able), LAST]
    times = measured(able, problems, streams)
    return [*sorted((name for name in able if times[name] < FAILED), key=times.__getitem__), LAST]


def measured(names: Sequence[str], problems: Sequence[Problem], streams: int) -> dict[str, float]:
    """Seconds that drivers take for these problems, from the cache where a like batch has been there before."""
    key = _key(problems, streams)
    if key not in _times:
        _times[key] = _kept().get(key, {})
    times = _times[key]
    missing = [name for name in names if name not in times]
    for name in missing:
        times[name] = _seconds(name, problems, streams, min(times.values(), default=FAILED))
    if missing:
        with suppress(OSError, RankwiseError):  # a folder that cannot be written to: measured again next time
            write_json(_file(), _kept() | {key: times})
    return times


def _seconds(name: str, problems: Sequence[Problem], streams: int, best: float) -> float:
    """Of the second of two runs, for the first one asks for memory; of the first where that is hopeless already.

    Before them one problem is run untimed: that loads and compiles.
    """
    device, start = problems[0].rows.device, 0.0
    try:
        for part in (problems[:1], problems, problems):
            _wait(device)
            start = perf_counter()
            jobs = _jobs(name, part, streams)
            on_streams(jobs, [1.0] * len(jobs), device, streams)
            _wait(device)
            if part is problems and perf_counter() - start > HOPELESS * best:
                break
    except FAILURES:
        return FAILED
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(problems: Sequence[Problem], streams: int) -> str:
    """Batches of about the same size share it."""
    rows = problems[0].rows
    chip = torch.cuda.get_device_name(rows.device) if rows.is_cuda else rows.device.type
    sizes = "x".join(str(power_of_two(size)) for size in (len(problems), *rows.shape))
    return f"{chip}, torch {torch.__version__}, {sizes}, weight {problems[0].weight is not None}, streams {streams}"


def _file() -> Path:
    return cache_folder() / "svd_drivers.json"


def _kept() -> dict[str, dict[str, float]]:
    """Times of earlier runs; none where the file is absent or damaged."""
    try:
        return {str(key): {n: float(t) for n, t in times.items()} for key, times in read_json(_file()).items()}
    except (RankwiseError, AttributeError, TypeError, ValueError):
        return {}


def _is_sound(found: Spectrum, problem: Problem, dtype: torch.dtype) -> bool:
    """Whether the vectors are orthogonal and, with the energies, act on random vectors as the matrix does."""
    basis, rows = found.basis, problem.rows
    unit = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    generator = torch.Generator(rows.device).manual_seed(0)
    z = torch.randn(len(rows), PROBES, dtype=rows.dtype, device=rows.device, generator=generator)
    back = rows.mT @ z
    expected = rows @ (back if problem.weight is None else problem.weight @ back)
    wide = basis.to(rows.dtype)
    error = (wide.mT @ (found.energy[:, None] * (wide @ z)) - expected).norm() / expected.norm().clamp_min(1e-300)
    return bool(torch.maximum((basis @ basis.mT - unit).abs().amax().double(), error) <= PASSES[dtype])


def _depth_at(found: Spectrum, rank: int | None) -> float:
    """σ_rank / σ_1 as found; 1 for a matrix of zeros."""
    share = found.energy[min(rank or len(found.energy), len(found.energy)) - 1] / found.energy[0].clamp_min(1e-300)
    return float(share.sqrt()) if bool(found.energy[0] > 0) else 1.0
