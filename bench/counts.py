"""Operations that torch carries out, counted while they run: by kind of work and precision.

Products come with torch's own formulas; decompositions and solutions with the textbook's (Golub and Van Loan,
Matrix Computations, 4th ed.): leading terms, in floating-point operations.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Formula = Callable[..., float]


def _matrices(a: torch.Tensor) -> int:
    return prod(a.shape[:-2])


def _eigh(a: torch.Tensor, *_: Any, vectors: bool = True) -> float:
    return (9 if vectors else 4 / 3) * _matrices(a) * a.shape[-1] ** 3


def _cholesky(a: torch.Tensor, *_: Any, **__: Any) -> int:
    return _matrices(a) * a.shape[-1] ** 3 // 3


def _inverse(a: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * _matrices(a) * a.shape[-1] ** 3 // 3  # from the Cholesky factor


def _solve(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    return _matrices(a) * (2 * a.shape[-1] ** 3 // 3 + 2 * a.shape[-1] ** 2 * b.shape[-1])


def _lu(a: torch.Tensor, *_: Any, **__: Any) -> int:
    return _matrices(a) * (3 * a.shape[-2] * a.shape[-1] ** 2 - a.shape[-1] ** 3) // 3  # more rows than columns


def _triangular(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    return prod(b.shape) * a.shape[-1]


def _svd(a: torch.Tensor, *_: Any, vectors: bool = True, **__: Any) -> float:
    return (22 if vectors else 8 / 3) * _matrices(a) * min(a.shape[-2:]) ** 2 * max(a.shape[-2:])


def _by_vector(a: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel()


FORMULAS: dict[str, tuple[str, Formula]] = {
    "_linalg_eigh": ("eigh", _eigh),
    "linalg_cholesky_ex": ("solve", _cholesky),
    "cholesky_inverse": ("solve", _inverse),
    "_linalg_solve_ex": ("solve", _solve),
    "linalg_lu_factor_ex": ("solve", _lu),
    "linalg_solve_triangular": ("solve", _triangular),
    "_linalg_svd": ("eigh", _svd),
    "mv": ("product with a vector", _by_vector),
}


class Counted(TorchDispatchMode):
    """Count while the context lasts.

    Attributes:
        operations: (kind of work, dtype) to floating-point operations.
        touched: bytes read and written by everything else that is not a view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vectors = True  # of decompositions are wanted, see `counting`
        self.operations: Counter[tuple[str, str]] = Counter()
        self.touched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation of torch."""
        out = func(*args, **(kwargs or {}))
        name, dtype = func.overloadpacket.__name__, str(args[0].dtype)[6:] if args and torch.is_tensor(args[0]) else ""
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)  # one formula for `addmm` and `addmm_`
        if name in FORMULAS:
            kind, formula = FORMULAS[name]
            more = {} if self.vectors else {"vectors": False}
            self.operations[kind, dtype] += int(formula(*args, **(kwargs or {}), **more))
        elif packet in flop_registry:
            count = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.operations["product", dtype] += int(count)
        elif not func.is_view and "detach" not in name and "empty" not in name:
            parts = [*args, *(out if isinstance(out, tuple | list) else [out])]
            self.touched += sum(part.numel() * part.element_size() for part in parts if torch.is_tensor(part))
        return out


@contextmanager
def counting() -> Iterator[Counted]:
    """Count what runs in the context.

    Seen from inside, torch's `eigvalsh` is an `eigh`; here it counts as what it is.
    """
    counted, values = Counted(), torch.linalg.eigvalsh

    def without_vectors(*given: Any, **options: Any) -> Any:
        counted.vectors = False
        try:
            return values(*given, **options)
        finally:
            counted.vectors = True

    torch.linalg.eigvalsh = without_vectors
    try:
        with counted:
            yield counted
    finally:
        torch.linalg.eigvalsh = values
