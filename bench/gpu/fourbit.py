"""4-bit products at decode: int4 dense against bitsandbytes' NF4 (Q1), a low-rank pair in int4 (Q2), nf4 itself."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import linear

from bench.gpu.work import Call, Contest, Goal, Work, built
from rankwise.kernels.fragments import Fragments
from rankwise.kernels.int4 import dequantize_int4, int4_linear, int4_lowrank, quantize_int4, repack_int4
from rankwise.kernels.nf4 import dequantize_nf4, nf4_linear, quantize_nf4, repack_nf4

try:
    import bitsandbytes
except Exception:  # a build for another CUDA says so in many ways
    bitsandbytes = None

TOLERANCE = 1e-2  # bf16 in and out, and levels of nf4 in bf16
PEER = "bitsandbytes"  # with its version: as of 0.50 it has kernels of its own for a few tokens
GOALS = {1: (3.5, 1.2), 16: (4.0, 3.0), 64: (7.0, 3.0)}  # tokens: microseconds on an H100, speed-up over the peer


def works(
    m: int = 4096, n: int = 4096, rank: int = 1024, group: int = 128, tokens: Sequence[int] = (1, 4, 16, 32, 64)
) -> list[Work]:
    """Q1: dense, for each number of tokens. Q2: the pair."""
    found = []
    for count in tokens:
        io = 2 * count * (m + n)
        goals = _goals(count)
        size = f"{m}x{n}, {count} tokens"
        found += [
            Work(
                "Q1",
                f"int4 dense {size}",
                _dense(m, n, group, count),
                _bytes(m, n, group, 2) + io,
                2 * count * m * n,
                goals,
            ),
            Work("Q1-nf4", f"nf4 dense {size}", _nf4(m, n, count), _bytes(m, n, 64, 4) + io, 2 * count * m * n),
        ]
    both = _bytes(rank, n, group, 2) + _bytes(m, rank, group, 2)
    for overlap in (False, True):
        name = f"int4 pair {m}x{n}, rank {rank}, 1 token" + (", overlapping" if overlap else "")
        goals = (Goal("microseconds", 3.2),)
        build = _pair(m, n, rank, group, 1, overlap)
        found.append(Work("Q2", name, build, both + 2 * (m + n), 2 * rank * (m + n), goals))
    return found


def _bytes(m: int, n: int, group: int, scale: int) -> int:
    return m * n // 2 + m * n // group * scale


def _goals(tokens: int) -> tuple[Goal, ...]:
    if tokens not in GOALS:
        return ()
    microseconds, speedup = GOALS[tokens]
    peer = (Goal("speedup", speedup, PEER),)  # missed, with nothing reached, where there is no bitsandbytes
    return (Goal("microseconds", microseconds), *peer)


def _peer_name() -> str:
    return f"{PEER} {bitsandbytes.__version__} NF4"


def _inputs(m: int, n: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and W with outputs of size 1."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(tokens, n, dtype=dtype, device=device), torch.randn(m, n, device=device) / n**0.5


def _contest(x: torch.Tensor, ours: Call, exact: torch.Tensor, peers: dict[str, Call]) -> Contest:
    dense = exact.to(x.dtype)
    peers = peers | {f"torch {torch.__version__} dense": lambda: linear(x, dense)}
    return Contest(ours, peers, lambda: x.double() @ exact.double().T, TOLERANCE)


def _dense(m: int, n: int, group: int, tokens: int) -> Callable[[torch.device], Contest]:
    def build(device: torch.device) -> Contest:
        x, w = _inputs(m, n, tokens, device)
        packed = repack_int4(quantize_int4(w, group))
        exact = dequantize_int4(packed, torch.float64)
        return _contest(x, lambda: int4_linear(x, packed), exact, _bitsandbytes(x, exact))

    return build


def _nf4(m: int, n: int, tokens: int) -> Callable[[torch.device], Contest]:
    def build(device: torch.device) -> Contest:
        x, w = _inputs(m, n, tokens, device)
        packed = repack_nf4(quantize_nf4(w))
        exact = dequantize_nf4(packed, torch.float64)
        return _contest(x, lambda: nf4_linear(x, packed), exact, _bitsandbytes(x, exact))

    return build


def _pair(m: int, n: int, rank: int, group: int, tokens: int, overlap: bool) -> Callable[[torch.device], Contest]:
    def build(device: torch.device) -> Contest:
        (x, v), (_, u) = _inputs(rank, n, tokens, device), _inputs(m, rank, tokens, device)
        packed = [repack_int4(quantize_int4(w, group)) for w in (v, u)]
        exact = [dequantize_int4(w, torch.float64) for w in packed]
        ours = _lowrank(x, packed, overlap and device.type == "cuda")
        dense = [w.to(x.dtype) for w in exact]
        peers: dict[str, Call] = {
            "int4, one after the other": lambda: int4_linear(int4_linear(x, packed[0]), packed[1]),
            f"torch {torch.__version__} pair": lambda: linear(linear(x, dense[0]), dense[1]),
        }
        return Contest(ours, peers, lambda: x.double() @ exact[0].T @ exact[1].T, TOLERANCE)

    return build


def _lowrank(x: torch.Tensor, packed: Sequence[Fragments], overlap: bool) -> Call:
    return lambda: int4_lowrank(x, packed[0], packed[1], overlap=overlap)


def _bitsandbytes(x: torch.Tensor, w: torch.Tensor) -> dict[str, Call]:
    """Its own product with the same matrix in NF4, which is another grid of numbers: timed, not judged."""
    if bitsandbytes is None or not x.is_cuda:
        return {}

    def make() -> Call:
        packed, state = bitsandbytes.functional.quantize_4bit(w.to(x.dtype), blocksize=64, quant_type="nf4")
        return lambda: bitsandbytes.matmul_4bit(x, packed.t(), state)

    return {_peer_name(): built(make)}
