"""int8 products at decode (Q3): dense and a low-rank pair, against the library's products in bf16."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import linear

from bench.gpu.work import Call, Contest, Goal, Work
from rankwise.kernels.int8 import align_int8, dequantize_int8, int8_linear, int8_lowrank, quantize_int8

TOLERANCE = 1e-2  # bf16 in and out
FASTER = (Goal("speedup", 1.4, "torch"),)  # half the bytes


def works(m: int = 4096, n: int = 4096, rank: int = 1000, tokens: Sequence[int] = (1, 4, 16, 64)) -> list[Work]:
    """Dense for each number of tokens; the pair for one, in a rank that 16 does not divide."""
    found = []
    for count in tokens:
        size = m * n + 2 * m + 2 * count * (m + n)
        goals = FASTER if count <= 16 else ()
        name = f"int8 dense {m}x{n}, {count} tokens"
        found.append(Work("Q3", name, _dense(m, n, count), size, 2 * count * m * n, goals))
    size = rank * (m + n) + 2 * (rank + m) + 2 * (m + n)
    for overlap in (False, True):
        name = f"int8 pair {m}x{n}, rank {rank}, 1 token" + (", overlapping" if overlap else "")
        goals = () if overlap else FASTER
        found.append(Work("Q3", name, _pair(m, n, rank, overlap), size, 2 * rank * (m + n), goals))
    return found


def _inputs(m: int, n: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and W with outputs of size 1."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(tokens, n, dtype=dtype, device=device), torch.randn(m, n, device=device) / n**0.5


def _dense(m: int, n: int, tokens: int) -> Callable[[torch.device], Contest]:
    def build(device: torch.device) -> Contest:
        x, w = _inputs(m, n, tokens, device)
        stored = align_int8(quantize_int8(w))
        exact = dequantize_int8(stored, torch.float64)
        plain = exact.to(x.dtype)
        peers: dict[str, Call] = {f"torch {torch.__version__} dense": lambda: linear(x, plain)}
        return Contest(lambda: int8_linear(x, stored), peers, lambda: x.double() @ exact.T, TOLERANCE)

    return build


def _pair(m: int, n: int, rank: int, overlap: bool) -> Callable[[torch.device], Contest]:
    def build(device: torch.device) -> Contest:
        (x, v), (_, u) = _inputs(rank, n, 1, device), _inputs(m, rank, 1, device)
        stored = [align_int8(quantize_int8(w)) for w in (v, u)]
        exact = [dequantize_int8(w, torch.float64) for w in stored]
        plain = [w.to(x.dtype) for w in exact]
        peers: dict[str, Call] = {
            "int8, one after the other": lambda: int8_linear(int8_linear(x, stored[0]), stored[1]),
            f"torch {torch.__version__} pair": lambda: linear(linear(x, plain[0]), plain[1]),
        }
        early = overlap and device.type == "cuda"
        ours = lambda: int8_lowrank(x, stored[0], stored[1], overlap=early)  # noqa: E731
        return Contest(ours, peers, lambda: x.double() @ exact[0].T @ exact[1].T, TOLERANCE)

    return build
