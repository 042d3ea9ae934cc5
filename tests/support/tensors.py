"""Random tensors on the device that tests run on, how far two are apart, and memory that is never zero by luck."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod

import numpy as np
import pytest
import torch

from rankwise.kernels.backend import AVAILABLE, backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# The interpreter's bf16 products are wrong without a word, so bf16 runs in Triton on a GPU alone.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
needs_triton = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed: no wheel for this platform")


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same ones for a shape and seed in every dtype."""
    generator = torch.Generator().manual_seed(prod(shape) + len(shape) + 7919 * seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """`‖a - b‖ / ‖b‖` in fp64; NaN stays NaN, which no bound admits."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


@contextmanager
def in_triton() -> Iterator[None]:
    """Kernels run in Triton, and memory that nothing has written to yet is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with backend("triton"):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def summed_in_order() -> Iterator[None]:
    """The interpreter's dot adds one product at a time, so an element's bits do not depend on where it stands.

    It calls numpy's matmul, and the BLAS behind that sums the rows and columns at a tile's edge in another order on
    some processors. Compiled kernels are left as they are.
    """

    def in_order(a: np.ndarray, b: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
        a, b = a.astype(dtype or a.dtype), b.astype(dtype or b.dtype)
        total = a[..., :, :1] * b[..., :1, :]
        for k in range(1, a.shape[-1]):
            total = total + a[..., :, k : k + 1] * b[..., k : k + 1, :]
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "matmul", in_order)
        yield


BACKENDS = [
    *(pytest.param(dtype, None, id=f"torch-{dtype}".replace("torch.", "")) for dtype in TOLERANCE),
    *(pytest.param(d, "triton", id=f"triton-{d}".replace("torch.", ""), marks=needs_triton) for d in TRITON_DTYPES),
]


def running(backend: str | None) -> AbstractContextManager[None]:
    """Triton, or whatever the device takes by itself."""
    return in_triton() if backend else nullcontext()
