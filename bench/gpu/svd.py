"""Singular value decompositions: a layer of a 7B (S1), their accuracy (S2), and block Jacobi on batches."""

import math
from collections.abc import Sequence

import torch

from bench.gpu.work import Contest, Goal, Work
from rankwise.kernels.drivers import DRIVERS
from rankwise.kernels.jacobi import jacobi
from rankwise.kernels.svd import svd

LAYERS = 32
BATCH = 64


def works(
    wide: int = 4096, tall: int = 11008, one: int = 2048, sizes: Sequence[int] = (32, 64, 128, 256)
) -> list[Work]:
    """The lines of this family; sizes are parameters so that they can be tried where there is no GPU."""
    return [
        layer(wide, tall),
        layer(wide, tall, wide // 2),
        single(one),
        *[accurate(one // 2, name) for name in ("eigh32", "mixed", "refined", "eigh64")],
        *[batch(size, BATCH if one >= 1024 else 2, half) for size in sizes for half in (16, 32) if size >= half],
    ]


def moments(size: int, device: torch.device) -> torch.Tensor:
    """`E[x xᵀ]` of inputs whose channels differ a hundredfold in size."""
    x = torch.randn(2 * size, size, device=device) * torch.logspace(-1, 1, size, device=device)
    return x.T @ x / (2 * size)


def exact(weights: Sequence[torch.Tensor], moments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Squared singular values of `W C^½`, falling, from `W C Wᵀ` or, for a tall W, from a factor of C."""
    found = []
    for w, c in zip((w.double() for w in weights), (c.double() for c in moments), strict=True):
        root = torch.linalg.cholesky(c) if len(w) > len(c) else None
        gram = w @ c @ w.T if root is None else root.T @ (w.T @ w) @ root
        found.append(torch.linalg.eigvalsh(gram).flip(0))
    return tuple(found)


def layer(wide: int, tall: int, rank: int | None = None) -> Work:
    """The seven linear layers of a block: q, k, v share their inputs' moments, gate and up theirs.

    With a rank, fp32 may be enough, and the goal of full spectra does not apply.
    """

    def build(device: torch.device) -> Contest:
        shapes = [(wide, wide)] * 4 + [(tall, wide)] * 2 + [(wide, tall)]
        attention, output, mlp, down = (moments(size, device) for size in (wide, wide, wide, tall))
        cs = [attention] * 3 + [output] + [mlp] * 2 + [down]
        ws = [torch.randn(*shape, device=device).bfloat16() for shape in shapes]

        def ours() -> tuple[torch.Tensor, ...]:
            return tuple(found.energy for found in svd(ws, list(cs), rank=rank))

        return Contest(ours, {}, lambda: exact(ws, cs), 1e-6 if rank is None else 1e-5)

    what = "full spectra" if rank is None else f"rank {rank}"
    name = f"1 of {LAYERS} layers, {what}: 4 of {wide}x{wide}, 2 of {tall}x{wide}, 1 of {wide}x{tall}"
    weights = 4 * wide * wide + 3 * wide * tall
    goals = () if rank else (Goal("seconds", 35 / LAYERS),)
    return Work("S1", name, build, 2 * weights + 4 * 2 * weights, 0, goals, cold=False, graph=False)


def single(size: int) -> Work:
    """One matrix alone against the library. Smaller than the model's, for the peer takes seconds."""

    def build(device: torch.device) -> Contest:
        w, c = torch.randn(size, size, device=device), moments(size, device)
        scaled = w @ torch.linalg.cholesky(c.double()).float()
        peers = {"torch.linalg.svd": lambda: torch.linalg.svd(scaled, full_matrices=False)}
        return Contest(lambda: svd([w], c)[0].energy, peers, lambda: exact([w], [c])[0], 1e-6)

    name = f"one {size}x{size}, data-aware, full spectrum"
    goals = (Goal("speedup", 20, "torch.linalg.svd"),)
    return Work("S1", name, build, 4 * 4 * size * size, 0, goals, cold=False, graph=False)


def accurate(size: int, driver: str) -> Work:
    """Error at several ranks over the least possible one, which is 1 in the reference. Its time is not a result."""
    depth = DRIVERS[driver].depth
    tolerance = 3e-4 if DRIVERS[driver].dtype == torch.float32 else 1e-6

    def build(device: torch.device) -> Contest:
        u, v = (torch.linalg.qr(torch.randn(size, size, device=device, dtype=torch.float64)).Q for _ in range(2))
        values = torch.logspace(0, 1.25 * math.log10(depth), size, device=device, dtype=torch.float64)
        w, ranks = u * values @ v, [size // 4, size // 2, size * 3 // 4]

        def ours() -> torch.Tensor:
            (found,) = svd([w], driver=driver)
            errors = [(w - found.u[:, :k].double() @ found.v[:k].double()).norm() for k in ranks]
            return torch.stack([e / values[k:].norm() for e, k in zip(errors, ranks, strict=True)])

        return Contest(ours, {}, lambda: torch.ones(len(ranks), device=device), tolerance)

    name = f"accuracy of {driver}: {size}x{size}, σ_k / σ_1 from {depth:.0e}"
    return Work("S2", name, build, 3 * 8 * size * size, cold=False, graph=False)


def batch(size: int, count: int, half: int) -> Work:
    """Small matrices by rotations; the library's eigh squares them first."""

    def build(device: torch.device) -> Contest:
        x = torch.randn(count, size, size, device=device)
        peers = {
            "torch.linalg.svd": lambda: torch.linalg.svd(x, full_matrices=False),
            "torch.linalg.eigh": lambda: torch.linalg.eigh(x @ x.mT),
        }
        return Contest(lambda: jacobi(x, half=half)[1], peers, lambda: torch.linalg.svdvals(x.double()), 1e-5)

    name = f"Jacobi, {count} of {size}x{size} fp32, blocks of {half}"
    return Work("S3", name, build, 4 * count * 3 * size * size, cold=False, graph=False)
