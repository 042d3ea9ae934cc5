"""fp32 products in fp32: a Gram matrix from TF32 or bf16 products is useless beyond its first few vectors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def tf32_allowed() -> bool:
    """Whether the process lets fp32 products on a GPU run in TF32, by either of PyTorch's two switches."""
    matmul: Any = torch.backends.cuda.matmul
    return bool(matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TF32, no bf16 and no autocast in matrix products while the context lasts, whatever the caller chose.

    The choice of TF32 is the process's, so products of other threads are exact meanwhile, too.
    """
    backends: Any = torch.backends  # its types know nothing of mkldnn's products
    settings = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
