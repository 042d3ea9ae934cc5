"""Low-rank, pivot and mixed groups at decode and prefill (K1 to K5, P1)."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import linear

from bench.gpu.work import Contest, Goal, Work
from rankwise.kernels import LowRank, Pivot, pack, packed_linear
from rankwise.kernels.packed import MOST_TOKENS, run

TOLERANCE = 1e-2  # bf16 operands, and the ranks' activations rounded to bf16
LLAMA = {"q,k,v": (4096, (4096, 4096, 4096)), "gate,up": (4096, (11008, 11008))}


def works(wide: int = 4096, rank: int = 1024, tall: int = 11008) -> list[Work]:
    """The lines of this family; sizes are parameters so that they can be tried where there is no GPU."""
    k1 = (Goal("microseconds", 6.2), Goal("bandwidth", 0.8), Goal("speedup", 1.5, "dense"), Goal("speedup", 1.2, "two"))
    k2 = (Goal("bandwidth", 0.8), Goal("speedup", 2.0, "dense"))
    k3 = {16: 7.0, 64: 9.0}
    found = [pair("K1", wide, wide, rank, 1, k1), pair("K2", tall, wide, rank, 1, k2)]
    for tokens, most in k3.items():
        goals = (Goal("microseconds", most), Goal("speedup", 1.2, "two"))
        found.append(pair("K3", wide, wide, rank, tokens, goals))
    found.append(pair("K4", wide, wide, rank, 4096 if wide == 4096 else 80, (Goal("speedup", 1.0, "two"),)))
    scale = wide / 4096
    for ratio in (0.8, 0.5):
        for name, (inputs, outputs) in LLAMA.items():
            sizes = [int(size * scale) // 16 * 16 for size in outputs]
            found.append(grouped(f"{name} at {ratio}", int(inputs * scale), sizes, ratio))
    return [*found, pivoted(wide, 2 * rank)]


def low_rank(outputs: int, inputs: int, rank: int, device: torch.device) -> LowRank:
    """Random factors whose product keeps the size of its input."""
    v = torch.randn(rank, inputs, device=device) / inputs**0.5
    return LowRank(v.bfloat16(), (torch.randn(outputs, rank, device=device) / rank**0.5).bfloat16())


def exact(x: torch.Tensor, members: Sequence[LowRank | Pivot]) -> torch.Tensor:
    """In fp64, layer by layer."""
    parts, x = [], x.double()
    for layer in members:
        z = x @ layer.first.double().T
        y = z @ layer.second.double().T
        parts.append(y if isinstance(layer, LowRank) else torch.cat([z, y], -1)[:, layer.index.long()])
    return torch.cat(parts, -1)


def pair(id_: str, outputs: int, inputs: int, rank: int, tokens: int, goals: tuple[Goal, ...]) -> Work:
    """One layer against the dense layer of its shape, and against two calls of the library."""

    def build(device: torch.device) -> Contest:
        layer, x = low_rank(outputs, inputs, rank, device), torch.randn(tokens, inputs, device=device).bfloat16()
        group, dense = pack([layer]), torch.randn(outputs, inputs, device=device).bfloat16()
        peers = {"dense cuBLAS": lambda: linear(x, dense), "two cuBLAS": lambda: linear(linear(x, layer.v), layer.u)}
        if tokens <= MOST_TOKENS:  # our own kernels, the second one started early: is `packed.PDL` worth it?
            tensors = x, group.first, group.second, group.table, None, None, None
            peers["dependent launch"] = lambda: run(*tensors, outputs, group.align, False, None, pdl=True)
        return Contest(lambda: packed_linear(x, group), peers, lambda: exact(x, [layer]), TOLERANCE)

    name = f"{outputs}x{inputs}, rank {rank}, {tokens} tokens"
    name += "" if tokens <= MOST_TOKENS else ", ours being two cuBLAS as well"  # so 1.0 is the middle of the noise
    weights = rank * (outputs + inputs)
    return Work(id_, name, build, 2 * (weights + tokens * (inputs + outputs)), 2 * tokens * weights, goals)


def grouped(name: str, inputs: int, outputs: Sequence[int], ratio: float) -> Work:
    """A packed group against the dense group in one product of the library."""
    ranks = [max(16, int(ratio * m * inputs / (m + inputs)) // 16 * 16) for m in outputs]

    def build(device: torch.device) -> Contest:
        members = [low_rank(m, inputs, rank, device) for m, rank in zip(outputs, ranks, strict=True)]
        x, dense = (
            torch.randn(1, inputs, device=device).bfloat16(),
            torch.randn(sum(outputs), inputs, device=device).bfloat16(),
        )
        group = pack(members)

        def separate() -> torch.Tensor:
            return torch.cat([linear(linear(x, m.v), m.u) for m in members], -1)

        peers = {"dense cuBLAS": lambda: linear(x, dense), "layer by layer": separate}
        return Contest(lambda: packed_linear(x, group), peers, lambda: exact(x, members), TOLERANCE)

    weights = sum(rank * (m + inputs) for m, rank in zip(outputs, ranks, strict=True))
    goal = (Goal("speedup", 0.9 / ratio, "dense"),)
    return Work("K5", name, build, 2 * (weights + inputs + sum(outputs)), 2 * weights, goal)


def pivoted(wide: int, rank: int) -> Work:
    """A pivot layer against a low-rank layer of the same rank, both ours."""

    def build(device: torch.device) -> Contest:
        index = torch.randperm(wide, device=device).to(torch.int32)
        basis = (torch.randn(rank, wide, device=device) / wide**0.5).bfloat16()
        layer = Pivot(index, basis, (torch.randn(wide - rank, rank, device=device) / rank**0.5).bfloat16())
        x, low = torch.randn(1, wide, device=device).bfloat16(), pack([low_rank(wide, wide, rank, device)])
        group, dense = pack([layer]), torch.randn(wide, wide, device=device).bfloat16()
        peers: dict[str, Callable[[], torch.Tensor]] = {
            "lowrank": lambda: packed_linear(x, low),
            "dense cuBLAS": lambda: linear(x, dense),
        }
        return Contest(lambda: packed_linear(x, group), peers, lambda: exact(x, [layer]), TOLERANCE)

    weights = rank * (2 * wide - rank)
    goals = (Goal("speedup", 1.2, "lowrank"),)
    return Work("P1", f"pivot {wide}x{wide}, rank {rank}, 1 token", build, 2 * (weights + 2 * wide), 2 * weights, goals)
