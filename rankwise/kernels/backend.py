"""Which arithmetic runs: Triton on a GPU, PyTorch and `native.c` elsewhere, or either by force; how kernels start.

Kernel files take `triton` and `tl` from here, so that they can be imported where Triton is not installed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from rankwise.errors import RankwiseError

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
    KERNEL_ERRORS: tuple[type[Exception], ...] = (triton.runtime.errors.TritonError,)  # of compilers and launches
except ImportError:  # e.g. macOS: PyTorch does it all
    AVAILABLE = False
    KERNEL_ERRORS = ()

    class _Absent:
        """Just enough for the definitions of kernels to be read."""

        constexpr = Any

        @staticmethod
        def jit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
            return function if function is not None else _Absent.jit

    triton = tl = _Absent()

__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "KERNEL_ERRORS",
    "Launch",
    "backend",
    "capability",
    "cdiv",
    "chosen",
    "launch",
    "power_of_two",
    "recording",
    "sm_count",
    "tl",
    "triton",
    "use_triton",
]

INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHOICES = ("auto", "torch", "triton")
SMS = 132  # where no device says: an H100's


def _from_environment() -> str:
    found = os.environ.get("RANKWISE_KERNELS", "auto")
    if found not in CHOICES:
        raise RankwiseError("RANKWISE_KERNELS", found, ", ".join(CHOICES))
    return found


_chosen = _from_environment()
_recorder: list["Launch"] | None = None
_pretended = 0


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as `recording` saw it.

    Args:
        kernel: the jit function.
        arguments: all of them by name, constants too.
        options: of the compiler, e.g. `num_warps`.
    """

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def use_triton(x: torch.Tensor) -> bool:
    """Whether kernels on `x` run in Triton.

    Raises:
        RankwiseError: Triton was asked for by name and cannot run on this tensor.
    """
    if _chosen == "auto":
        return AVAILABLE and x.is_cuda and x.dtype in DTYPES
    runs = AVAILABLE and (x.is_cuda or INTERPRETED or _recorder is not None) and x.dtype in DTYPES
    if _chosen == "triton" and not runs:
        allowed = "a CUDA tensor in fp16, bf16 or fp32 with Triton installed, or TRITON_INTERPRET=1"
        raise RankwiseError("kernels", f"triton on {x.device.type} in {x.dtype}", allowed)
    return _chosen == "triton"


def chosen() -> str:
    """`auto`, or what is forced: `torch` or `triton`."""
    return _chosen


@contextmanager
def backend(choice: str) -> Iterator[None]:
    """Force `torch` (plain, without `native.c`) or `triton`, or go back to `auto`, while the context lasts.

    The environment variable RANKWISE_KERNELS does it for a whole process.
    """
    global _chosen
    if choice not in CHOICES:
        raise RankwiseError("kernels", choice, ", ".join(CHOICES))
    before, _chosen = _chosen, choice
    try:
        yield
    finally:
        _chosen = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **more: Any) -> None:
    """Start a kernel on a grid; `more` are its constants and the compiler's options. An empty grid is nothing to do.

    Products and sums are fused, whatever the version of Triton does by itself.
    """
    more = {"enable_fp_fusion": True} | more
    if _recorder is not None:
        _recorder.append(_seen(kernel, args, more))
    elif all(grid):
        kernel[grid](*args, **more)


@contextmanager
def recording(capability: int = 0) -> Iterator[list[Launch]]:
    """Note kernels instead of starting them: so they can be compiled for a chip that is not here.

    Their tensors may be on the meta device.

    Args:
        capability: of the chip that launchers are to choose their tiles for.
    """
    global _recorder, _pretended
    before, _recorder, _pretended = (_recorder, _pretended), [], capability
    try:
        yield _recorder
    finally:
        _recorder, _pretended = before


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a device; an H100's where there is none."""
    return _sm_count(device.index) if device.type == "cuda" else SMS


def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for Hopper; without a CUDA device what `recording` pretends, or 0."""
    return _capability(device.index) if device.type == "cuda" else _pretended


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two from n."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache
def _sm_count(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index or 0).multi_processor_count)


@lru_cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index or 0)
    return major * 10 + minor


def _seen(kernel: Any, args: tuple[Any, ...], more: dict[str, Any]) -> Launch:
    named = dict(zip(kernel.arg_names, args, strict=False))
    named |= {key: value for key, value in more.items() if key in kernel.arg_names}
    defaults = {parameter.name: parameter.default for parameter in kernel.params if parameter.has_default}
    options = {key: value for key, value in more.items() if key not in kernel.arg_names}
    return Launch(kernel, defaults | named, options)
