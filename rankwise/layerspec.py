"""LayerSpec: what one linear layer becomes. Plain data; `plan.py` makes plans of it."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.storage import Precision, Stored, layer_matrices

KINDS = ("dense", "lowrank", "pivot")


def layer_parameters(kind: str, rank: int, out_features: int, in_features: int) -> int:
    """Numbers that a layer stores: `mn`, `k(m+n)` (lowrank) or `k(m+n-k)` (pivot, PIFA 2501.19090)."""
    if kind == "dense":
        return out_features * in_features
    saved = rank if kind == "pivot" else 0
    return rank * (out_features + in_features - saved)


@dataclass(frozen=True)
class LayerSpec:
    """What one linear layer becomes.

    Args:
        kind: `dense`, `lowrank` or `pivot`.
        out_features: m, rows of the weight `[m, n]`.
        in_features: n.
        rank: k, with `1 <= k <= min(m, n)`; for dense layers the full rank.
        weights: how numbers are stored: `bf16`, `fp16`, `fp32`, `nf4`, `int4` or `int8`.
        energy: share of the metric's energy kept, 0..1 (None if unknown).
        loss: predicted increase of the loss, nats a token, by the curvature's quadratic model (None if unknown).
        indices: the kept components, rising, where they are not the first `rank` (any-k selection); else None.
        group: of `int4`, see `storage.Precision`: it divides the columns of every matrix of the layer.
        asymmetric: likewise.
        dense_shape: (m, n) of the layer before channels were taken out of it (`alloc.channels`), where some were.
    """

    kind: str
    out_features: int
    in_features: int
    rank: int
    weights: str = "bf16"
    energy: float | None = None
    loss: float | None = None
    indices: tuple[int, ...] | None = None
    group: int | None = None
    asymmetric: bool = False
    dense_shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RankwiseError("kind", self.kind, f"allowed: {', '.join(KINDS)}")
        precision = self.precision
        for name in ("out_features", "in_features", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RankwiseError(name, value, "allowed: a whole number from 1")
        for name in ("energy", "loss"):
            check_number(name, getattr(self, name))
        if self.rank > self.full_rank:
            raise RankwiseError("rank", self.rank, f"allowed: 1 to {self.full_rank}")
        self._check_indices()
        self._check_dense_shape()
        if self.kind == "pivot" and self.rank == self.full_rank:
            raise RankwiseError("rank", self.rank, f"as large as dense; allowed for pivot: 1 to {self.full_rank - 1}")
        if self.parameters > self.out_features * self.in_features:
            allowed = self.out_features * self.in_features // (self.out_features + self.in_features)
            raise RankwiseError("rank", self.rank, f"larger than dense; allowed for lowrank: 1 to {allowed}")
        precision.require_blocks("in_features", self.in_features)
        if self.kind != "dense":
            precision.require_blocks("rank", self.rank)

    def _check_indices(self) -> None:
        if self.indices is None:
            return
        kept = tuple(self.indices)
        object.__setattr__(self, "indices", kept)
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in kept)
        rising = whole and all(a < b for a, b in pairwise((-1, *kept, self.full_rank)))
        if self.kind == "dense" or not rising or len(kept) != self.rank:
            allowed = f"for lowrank and pivot: {self.rank} rising whole numbers from 0 to {self.full_rank - 1}"
            raise RankwiseError("indices", f"{len(kept)} of them, {list(kept[:4])}...", allowed)

    def _check_dense_shape(self) -> None:
        if self.dense_shape is None:
            return
        found, least = tuple(self.dense_shape), (self.out_features, self.in_features)
        object.__setattr__(self, "dense_shape", found)
        whole = all(isinstance(size, int) and not isinstance(size, bool) for size in found)
        if len(found) != 2 or not whole or found == least or any(a < b for a, b in zip(found, least, strict=True)):
            raise RankwiseError("dense_shape", list(found), f"[out, in], larger than {list(least)}")

    @property
    def full_rank(self) -> int:
        """min(m, n)."""
        return min(self.out_features, self.in_features)

    @property
    def original_shape(self) -> tuple[int, int]:
        """(out, in) in the dense model."""
        return self.dense_shape or (self.out_features, self.in_features)

    @property
    def dense_parameters(self) -> int:
        """m·n, of the dense model."""
        return math.prod(self.original_shape)

    @property
    def parameters(self) -> int:
        """Numbers stored (bias and the pivots' index not counted)."""
        return layer_parameters(self.kind, self.rank, self.out_features, self.in_features)

    @property
    def ratio(self) -> float:
        """Share of the layer's parameters kept."""
        return self.parameters / self.dense_parameters

    @property
    def precision(self) -> Precision:
        """How the numbers are stored, in one piece."""
        return Precision(self.weights, self.group, self.asymmetric)

    @property
    def quantised(self) -> bool:
        """True if the numbers are stored in 4 or 8 bits."""
        return self.precision.quantised

    @property
    def recoded(self) -> bool:
        """True if it takes a module of ours: factored, or in 4 or 8 bits. All else is an `nn.Linear`."""
        return self.kind != "dense" or self.quantised

    @property
    def compressed(self) -> bool:
        """True unless the layer stays as it was: dense, in 16 or 32 bits, with all its channels."""
        return self.recoded or self.dense_shape is not None

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name and shape of each matrix that the layer is made of."""
        return layer_matrices(self.kind, self.rank, self.out_features, self.in_features)

    @property
    def tensors(self) -> dict[str, Stored]:
        """The tensors that hold the layer's numbers, by their names below the module (no bias, no guard)."""
        index = {"pivot_index": Stored((self.out_features,), "int32")} if self.kind == "pivot" else {}
        precision = self.precision
        parts = {name: precision.tensors(*shape) for name, shape in sorted(self.matrices.items())}
        return index | {name + end: stored for name, part in parts.items() for end, stored in part.items()}

    @property
    def bytes(self) -> int:
        """Bytes of `tensors`: scales, zero points and the pivots' index included."""
        return sum(stored.bytes for stored in self.tensors.values())

    def stored_as(self, precision: Precision) -> "LayerSpec":
        """The same layer, its numbers stored in another way."""
        return replace(self, weights=precision.weights, group=precision.group, asymmetric=precision.asymmetric)


def check_number(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number or None."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not number:
        raise RankwiseError(name, value, "allowed: a finite number, or null")
