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
SENSE = 0.1  # an excess above it is no rounding, but a wrong answer


def works(
    wide: int = 4096, tall: int = 11008, one: int = 2048, sizes: Sequence[int] = (32, 64, 128, 256)
) -> list[Work]:
    """The lines of this family; sizes are parameters so that they can be tried where there is no GPU."""
    return [
        *[accurate(one // 2, name) for name in ("eigh32", "mixed", "refined", "eigh64")],
        layers(wide, tall, LAYERS if one >= 1024 else 2),
        loop(wide, tall),
        layers(wide, tall, 1, wide // 2),
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


def layers(wide: int, tall: int, count: int, rank: int | None = None) -> Work:
    """The seven linear layers of each block, block by block: q, k, v share their inputs' moments, gate and up theirs.

    With a rank, fp32 may be enough, and the goal of full spectra does not apply. The spectra of one block are checked.
    """

    def build(device: torch.device) -> Contest:
        blocks = [block(wide, tall, device) for _ in range(count)]
        svd(blocks[0][0], list(blocks[0][1]), rank=rank)  # libraries are loaded, and the fastest driver is known

        def ours() -> tuple[torch.Tensor, ...]:
            found = [tuple(each.energy for each in svd(ws, list(cs), rank=rank)) for ws, cs in blocks]
            return found[-1]

        return Contest(ours, {}, lambda: exact(*blocks[-1]), 1e-6 if rank is None else 1e-5)

    what = "full spectra" if rank is None else f"rank {rank}"
    name = f"{7 * count} matrices, {what}: {count} times 4 of {wide}x{wide}, 2 of {tall}x{wide}, 1 of {wide}x{tall}"
    weights = count * (4 * wide * wide + 3 * wide * tall)
    goals = () if rank else (Goal("seconds", 35 * count / LAYERS),)
    return Work("S1", name, build, 2 * weights + 4 * 2 * weights, 0, goals, cold=False, graph=False, once=True)


def block(wide: int, tall: int, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights in bf16 and their inputs' moments."""
    shapes = [(wide, wide)] * 4 + [(tall, wide)] * 2 + [(wide, tall)]
    attention, output, mlp, down = (moments(size, device) for size in (wide, wide, wide, tall))
    weights = [torch.randn(*shape, device=device).bfloat16() for shape in shapes]
    return weights, [attention] * 3 + [output] + [mlp] * 2 + [down]


def loop(wide: int, tall: int) -> Work:
    """One square and one tall matrix of the model against a loop of the library's decomposition of `W C^½`."""

    def build(device: torch.device) -> Contest:
        c = moments(wide, device)
        ws = [torch.randn(rows, wide, device=device) for rows in (wide, tall)]
        root = torch.linalg.cholesky(c.double()).float()
        warm = torch.randn(64, 64, device=device)
        svd(ws, [c, c]), torch.linalg.svd(warm)  # libraries are loaded, and the fastest driver is known
        peers = {"torch.linalg.svd": lambda: [torch.linalg.svd(w @ root, full_matrices=False) for w in ws]}
        return Contest(lambda: tuple(found.energy for found in svd(ws, [c, c])), peers, lambda: exact(ws, [c, c]), 1e-6)

    name = f"{wide}x{wide} and {tall}x{wide}, data-aware, full spectra, against a loop"
    goals = (Goal("speedup", 20, "torch.linalg.svd"),)
    size = wide * wide + wide * tall
    return Work("S1", name, build, 4 * 4 * size, 0, goals, cold=False, graph=False, once=True)


def accurate(size: int, driver: str) -> Work:
    """Excess at several ranks of the error in the metric over the least possible one. Its time is not a result."""
    depth = DRIVERS[driver].depth
    bound = 3e-4 if DRIVERS[driver].dtype == torch.float32 else 1e-6

    def build(device: torch.device) -> Contest:
        u, v = (torch.linalg.qr(torch.randn(size, size, device=device, dtype=torch.float64)).Q for _ in range(2))
        values = torch.logspace(0, 1.25 * math.log10(depth), size, device=device, dtype=torch.float64)
        c, ranks = moments(size, device).double(), [size // 4, size // 2, size * 3 // 4]
        root = torch.linalg.cholesky(c)
        w = torch.linalg.solve_triangular(root, u * values @ v, upper=False, left=False)

        def ours() -> torch.Tensor:
            (found,) = svd([w], c, driver=driver)
            errors = [((w - found.u[:, :k].double() @ found.v[:k].double()) @ root).norm() for k in ranks]
            return torch.stack([e / values[k:].norm() for e, k in zip(errors, ranks, strict=True)])

        return Contest(ours, {}, lambda: torch.ones(len(ranks), device=device), SENSE)

    name = f"accuracy of {driver}, data-aware: {size}x{size}, σ_k / σ_1 from {depth:.0e}"
    goals = (Goal("error", bound),)
    return Work("S2", name, build, 3 * 8 * size * size, goals=goals, cold=False, graph=False, once=True)


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
