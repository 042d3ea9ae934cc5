"""Decompositions in a metric against LAPACK in fp64: reconstruction, spectrum, excess error, and what is refused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE, draw, in_triton, needs_triton, relative_error

from bench.gpu import svd as suite
from bench.gpu.measure import error
from bench.gpu.work import Work
from rankwise.errors import RankwiseError
from rankwise.kernels import drivers
from rankwise.kernels.backend import KERNEL_ERRORS
from rankwise.kernels.drivers import DRIVERS
from rankwise.kernels.eigen import eigh, put_back, shared_out
from rankwise.kernels.svd import Metric, Svd, svd

SHAPES = [pytest.param(m, n, id=f"{m}x{n}") for m, n in [(12, 20), (16, 16), (20, 12), (1, 8), (8, 1), (1, 1)]]
METRICS = pytest.mark.parametrize("sides", [0, 1, 2], ids=["plain", "inputs", "both"])
NAMES = pytest.mark.parametrize("driver", DRIVERS)


def moments(size: int, seed: int = 0) -> torch.Tensor:
    """`E[x xᵀ]` of inputs whose channels differ a hundredfold in size."""
    x = draw(4 * size + 8, size, seed=seed + 11) * torch.logspace(-1, 1, size, dtype=torch.float64, device=DEVICE)
    turn = torch.linalg.qr(draw(size, size, seed=seed + 5)).Q
    return turn @ (x.mT @ x / len(x)) @ turn.mT


def metric(m: int, n: int, sides: int) -> Metric:
    return (None, moments(n), (moments(m, seed=3), moments(n)))[sides]


def square_root(matrix: torch.Tensor) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix.double().cpu().numpy())
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def in_metric(w: torch.Tensor, of: Metric) -> np.ndarray:
    """`F^½ W C^½`."""
    f, c = of if isinstance(of, tuple) else (None, of)
    found = w.double().cpu().numpy()
    found = found if c is None else found @ square_root(c)
    return found if f is None else square_root(f) @ found


def excess(w: torch.Tensor, of: Metric, found: Svd, rank: int) -> float:
    """Of the error with so many components over the least possible one, as a share of the latter."""
    best = np.linalg.norm(np.linalg.svd(in_metric(w, of), compute_uv=False)[rank:])
    rest = w.double() - found.u[:, :rank].double() @ found.v[:rank].double()
    return float(np.linalg.norm(in_metric(rest, of)) / best - 1)


def spectrum(values: torch.Tensor, length: int, seed: int = 0) -> torch.Tensor:
    """A random matrix with these singular values."""
    s = len(values)
    u, v = torch.linalg.qr(draw(s, s, seed=seed + 1)).Q, torch.linalg.qr(draw(length, s, seed=seed + 2)).Q
    return u * values.to(DEVICE, torch.float64) @ v.mT


# --- the answer -------------------------------------------------------------------------------------------------------


@METRICS
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_equals_numpy(m: int, n: int, sides: int) -> None:
    w, of = draw(m, n), metric(m, n, sides)
    (found,) = svd([w], of)
    exact = torch.from_numpy(np.linalg.svd(in_metric(w, of), compute_uv=False))
    assert relative_error(found.u @ found.v, w) <= 1e-12
    assert relative_error(found.energy.cpu(), exact.square()) <= 1e-12
    assert (found.u.shape, found.v.shape) == ((m, min(m, n)), (min(m, n), n))
    assert all(excess(w, of, found, k) <= 1e-9 for k in range(1, min(m, n)))


@METRICS
@NAMES
@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24)], ids=["wide", "tall"])
def test_vectors_are_orthogonal_in_the_metric(m: int, n: int, sides: int, driver: str) -> None:
    """As far down as the driver reaches: `uᵀ F u` and `v C vᵀ` are diagonal, and their product is the energy."""
    w, of = spectrum(torch.logspace(0, -1, 24), 40), metric(m, n, sides)
    (found,) = svd([w if m < n else w.mT], of, driver=driver)
    f, c = of if isinstance(of, tuple) else (None, of)
    u, v = found.u.double(), found.v.double()
    left = u.mT @ (u if f is None else f.double() @ u)
    right = (v if c is None else v @ c.double()) @ v.mT
    bound = 2e-3 if DRIVERS[driver].dtype == torch.float32 else 1e-8
    k = int(((found.energy / found.energy[0]).sqrt() >= DRIVERS[driver].depth).sum())
    assert k >= 8
    for gram in (left, right):
        long = gram.diagonal().sqrt()
        cosines = gram / (long[:, None] * long) - torch.eye(24, device=DEVICE)
        assert float(cosines[:k, :k].abs().max()) <= bound
    assert relative_error(left.diagonal() * right.diagonal(), found.energy) <= bound


@needs_triton
@pytest.mark.parametrize("driver", ["jacobi32", "jacobi64", "refined"])
def test_our_own_rotations(driver: str) -> None:
    """Seven decades: refinement keeps one more of them than rotations in fp32 alone, fp64 keeps all."""
    w = spectrum(torch.logspace(0, -7, 15), 18)
    with in_triton():
        (found,) = svd([w], driver=driver, depth=0)
    ranks = {"jacobi32": (3, 6, 9), "refined": (6, 8, 10), "jacobi64": (6, 9, 14)}[driver]
    assert max(excess(w, None, found, k) for k in ranks) <= (1e-6 if driver == "jacobi64" else 3e-4)
    assert relative_error(found.u @ found.v, w) <= 1e-6


@pytest.mark.parametrize(("decades", "accepted"), [(1, "eigh32"), (5, "mixed"), (9, "eigh64")])
def test_the_spectrum_decides_over_the_precision(decades: int, accepted: str) -> None:
    w = spectrum(torch.logspace(0, -decades, 24), 40)
    (found,) = svd([w.float()], rank=12)
    assert DEVICE == "cuda" or found.driver == accepted
    assert excess(w.float(), None, found, 11) <= 3e-4
    assert found.u.shape == (24, 12)
    assert len(found.energy) == 24


def test_matrices_of_one_shape_may_need_different_precision() -> None:
    ws = [spectrum(torch.logspace(0, -decades, 24), 40, seed=decades) for decades in (1, 9, 1, 5)]
    found = svd(ws, rank=12)
    assert DEVICE == "cuda" or [f.driver for f in found] == ["eigh32", "eigh64", "eigh32", "mixed"]
    assert all(excess(w, None, f, 11) <= 3e-4 for w, f in zip(ws, found, strict=True))


def test_ill_conditioned_to_1e_12_at_any_rank() -> None:
    w = spectrum(torch.logspace(0, -12, 30, dtype=torch.float64), 40)
    (found,) = svd([w], depth=0)
    assert found.driver in ("svd", "jacobi64")
    assert max(excess(w, None, found, k) for k in (5, 15, 20, 25)) <= 1e-6


@METRICS
def test_rank_deficient(sides: int) -> None:
    w = draw(16, 3) @ draw(3, 24)
    (found,) = svd([w], metric(16, 24, sides))
    assert float(found.energy[3] / found.energy[0]) <= 1e-14
    assert relative_error(found.u[:, :3] @ found.v[:3], w) <= 1e-7


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12)], ids=["wide", "tall"])
@pytest.mark.parametrize("both", [False, True], ids=["inputs", "both"])
def test_metric_that_lacks_directions(m: int, n: int, both: bool) -> None:
    """Fewer tokens than features, and dead channels."""
    few = draw(5, n) * (torch.arange(n, device=DEVICE) != 2)
    of: Metric = (moments(m), few.mT @ few) if both else few.mT @ few
    w = draw(m, n)
    (found,) = svd([w], of)
    exact = torch.from_numpy(np.linalg.svd(in_metric(w, of), compute_uv=False)).square()
    assert relative_error(found.energy.cpu(), exact) <= 1e-9
    assert relative_error(found.u[:, :5] @ found.v[:5] @ few.mT, w @ few.mT) <= 1e-4
    assert relative_error(found.u @ found.v, w) <= 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
@METRICS
def test_scales_cancel(scale: float, sides: int) -> None:
    """Even in fp32, whose squares would be zero or infinite."""
    w, of = draw(12, 20, dtype=torch.float32), metric(12, 20, sides)
    larger = of if of is None else scale * of if isinstance(of, torch.Tensor) else (scale * of[0], scale * of[1])
    plain, scaled = svd([w, scale * w], [of, larger], rank=4)
    power = 2 + (0 if of is None else 2 if isinstance(of, tuple) else 1)
    assert relative_error(scaled.energy / scale**power, plain.energy) <= 1e-6
    assert relative_error(scaled.u @ scaled.v / scale, plain.u @ plain.v) <= 1e-5
    assert relative_error(scaled.u.norm(dim=0), scaled.v.norm(dim=1)) <= 1e-5


def test_zeros() -> None:
    (found,) = svd([torch.zeros(3, 5, device=DEVICE)])
    assert not found.energy.any()
    assert not (found.u @ found.v).any()


def test_powers_of_two_on_a_diagonal() -> None:
    (found,) = svd([torch.diag(2.0 ** torch.arange(6, device=DEVICE))])
    assert relative_error(found.energy, 4.0 ** torch.arange(5, -1, -1, device=DEVICE)) <= 1e-14
    assert relative_error((found.u**2).sum(0), 2.0 ** torch.arange(5, -1, -1, device=DEVICE)) <= 1e-6


def test_dtypes_order_and_inputs_stay() -> None:
    ws = [draw(6, 9, dtype=torch.bfloat16), draw(9, 6).mT[:, ::2], draw(6, 9, seed=1), draw(4, 2, dtype=torch.float16)]
    copies = [w.clone() for w in ws]
    found = svd(ws)
    assert [f.u.dtype for f in found] == [torch.float32, torch.float64, torch.float64, torch.float32]
    for w, copy, f in zip(ws, copies, found, strict=True):
        assert torch.equal(w, copy)
        assert relative_error(f.u.double() @ f.v.double(), w) <= 1e-6
    assert svd([]) == []


def test_the_callers_tf32_is_not_used_and_not_lost() -> None:
    """On a CPU too: `medium` would mean bf16 products there."""
    w = draw(24, 40, dtype=torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(DEVICE, torch.bfloat16):
            (found,) = svd([w], driver="eigh32")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert relative_error(found.u.double() @ found.v.double(), w) <= 1e-6
    assert found.u.dtype == torch.float32


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_shape(m: int, n: int, sides: int, seed: int) -> None:
    w = draw(m, n, seed=seed)
    (found,) = svd([w], metric(m, n, sides))
    assert relative_error(found.u @ found.v, w) <= 1e-10
    assert bool((found.energy.diff() <= 0).all())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("w", "of", "text"),
    [
        (torch.tensor([[1.0, torch.nan]]), None, "matrix 0: .*NaN"),
        (torch.tensor([[1.0, torch.inf]]), None, "matrix 0: .*Inf"),
        (torch.ones(2, 3), torch.full((3, 3), torch.nan), "metric of matrix 0: .*NaN"),
        (torch.ones(2, 3), torch.zeros(3, 3), "metric of matrix 0: .*zero"),
        (torch.ones(2, 3), -torch.eye(3), "indefinite"),
        (torch.ones(2, 3), (torch.diag(torch.tensor([2.0, -1.0])), torch.eye(3)), "indefinite"),
        (torch.eye(3), torch.diag(torch.tensor([3.0, 1.0, -1.0])), "indefinite"),
        (torch.ones(2, 3), torch.eye(2), "metric of matrix 0"),
        (torch.ones(2, 3), [None, None], "metric"),
        (torch.ones(6), None, "matrix 0"),
        (torch.ones(0, 3), None, "matrix 0"),
        (torch.ones(2, 3, dtype=torch.int64), None, "matrix 0"),
    ],
)
def test_unusable_input_is_named(w: torch.Tensor, of: Metric, text: str) -> None:
    with pytest.raises(RankwiseError, match=text):
        svd([w], of)


@pytest.mark.parametrize("options", [{"rank": 0}, {"driver": "magic"}])
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(RankwiseError, match=next(iter(options))):
        svd([torch.ones(2, 3)], **options)


def failing(error: Exception) -> drivers.Algorithm:
    """A driver that comes to nothing once it runs."""

    def job() -> list[drivers.Spectrum]:
        raise error

    return lambda *_: [job]


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("no convergence"), torch.OutOfMemoryError("no memory")])
def test_a_driver_that_fails_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    w = draw(12, 20)
    for name in ("eigh32", "mixed", "eigh64"):
        monkeypatch.setitem(DRIVERS, name, drivers.Driver(failing(error), DRIVERS[name].dtype, DRIVERS[name].depth))
    monkeypatch.setattr(drivers, "ranking", lambda *_: ["eigh64", "svd"])
    (found,) = svd([w])
    assert found.driver == "svd"
    text = "eigh64: no convergence" if isinstance(error, torch.linalg.LinAlgError) else "no memory"
    with pytest.raises(type(error), match=text):
        svd([w], driver="eigh64")


def test_a_shape_whose_driver_fails_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes run together, and are judged one by one."""

    def broken_at_12(problems: Sequence[drivers.Problem], *more: Any) -> list[drivers.Job]:
        run = failing(torch.linalg.LinAlgError("no")) if len(problems[0].rows) == 12 else eigh
        return run(problems, *more)

    monkeypatch.setitem(DRIVERS, "eigh64", drivers.Driver(broken_at_12, torch.float64, 1e-6))
    monkeypatch.setattr(drivers, "ranking", lambda *_: ["eigh64", "svd"])
    groups = [[drivers.Problem(draw(size, 20, seed=i)) for i in range(2)] for size in (9, 12, 10)]
    found = drivers.decompose(groups, rank=None, depth=1e-6, driver="auto", streams=3)
    assert [[name for _, name in group] for group in found] == [["eigh64"] * 2, ["svd"] * 2, ["eigh64"] * 2]
    for problems, spectra in zip(groups, found, strict=True):
        for problem, (spectrum, _) in zip(problems, spectra, strict=True):
            assert relative_error(spectrum.energy, torch.linalg.svdvals(problem.rows).square()) <= 1e-12


# --- choosing and running ---------------------------------------------------------------------------------------------


def test_times_are_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(drivers, "_times", {})
    problems = [drivers.Problem(draw(6, 9))] * 2
    times = drivers.measured(["eigh32", "eigh64"], problems, 1)
    assert set(times) == {"eigh32", "eigh64"}
    assert all(0 < seconds < drivers.FAILED for seconds in times.values())
    monkeypatch.setattr(drivers, "_times", {})
    monkeypatch.setattr(drivers, "_seconds", lambda *_: 7.0)
    assert drivers.measured(["eigh32", "svd"], problems, 1) == {**times, "svd": 7.0}
    (drivers._file()).write_text("{ damaged")
    monkeypatch.setattr(drivers, "_times", {})
    assert drivers.measured(["svd"], problems, 1) == {"svd": 7.0}


def test_loading_and_compiling_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run, of one problem, takes long; so would any driver's that compiles."""
    seen: list[int] = []
    now = [0.0]

    def compiles(problems: Sequence[drivers.Problem], *more: Any) -> list[drivers.Job]:
        now[0] += 0.001 if seen else 60.0
        seen.append(len(problems))
        return eigh(problems, *more)

    monkeypatch.setattr(drivers, "perf_counter", lambda: now[0])
    monkeypatch.setitem(DRIVERS, "eigh64", drivers.Driver(compiles, torch.float64, 1e-6))
    seconds = drivers._seconds("eigh64", [drivers.Problem(draw(6, 9))] * 3, 1, 0.001)
    assert seconds == pytest.approx(0.001)
    assert seen == [1, 3, 3]


class DoesNotFit(*KERNEL_ERRORS, Exception):
    """As Triton's own errors, no RuntimeError."""


def test_a_kernel_that_does_not_fit_is_a_driver_less(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [drivers.Problem(draw(6, 9))]
    for trouble in (DoesNotFit(), torch.OutOfMemoryError(), RuntimeError()):
        monkeypatch.setitem(DRIVERS, "jacobi32", drivers.Driver(failing(trouble), torch.float32, 1e-4))
        assert drivers._seconds("jacobi32", problems, 1, drivers.FAILED) == drivers.FAILED
    monkeypatch.setitem(
        DRIVERS, "jacobi32", drivers.Driver(failing(RankwiseError("metric", "indefinite", "")), torch.float32, 1e-4)
    )
    with pytest.raises(RankwiseError, match="indefinite"):
        drivers._seconds("jacobi32", problems, 1, drivers.FAILED)


@pytest.mark.skipif(DEVICE == "cpu", reason="streams need a GPU")
def test_streams_give_the_same_as_one_after_the_other() -> None:
    ws = [draw(96, 128, seed=i, dtype=torch.float32) for i in range(7)]
    alone, together = svd(ws, driver="eigh64", streams=1), svd(ws, driver="eigh64", streams=3)
    assert all(torch.equal(a.energy, b.energy) for a, b in zip(alone, together, strict=True))


@given(st.lists(st.floats(0.5, 100), min_size=1, max_size=20), st.integers(1, 5))
def test_lanes_share_the_work_and_results_keep_the_jobs_order(costs: list[float], lanes: int) -> None:
    lanes = min(lanes, len(costs))
    mine = shared_out(costs, lanes)
    assert sorted(i for numbers in mine for i in numbers) == list(range(len(costs)))
    loads = [sum(costs[i] for i in numbers) for numbers in mine]
    assert min(loads) > 0
    assert max(loads) - min(loads) <= max(costs) * (1 + 1e-9)
    assert put_back(mine, [[f"job {i}" for i in numbers] for numbers in mine]) == [
        f"job {i}" for i in range(len(costs))
    ]


def test_a_costly_job_has_a_lane_to_itself() -> None:
    assert shared_out([1, 1, 5, 1, 1, 1], 2) == [[2], [0, 1, 3, 4, 5]]


@needs_triton
@pytest.mark.parametrize("work", suite.works(32, 48, 32, (16,)), ids=lambda work: work.name)
def test_the_suites_lines_are_right(work: Work) -> None:
    torch.manual_seed(0)
    with in_triton():
        contest = work.build(torch.device(DEVICE))
        assert error(contest.ours(), contest.reference()) <= contest.tolerance
    for peer in contest.peers.values():
        peer()
