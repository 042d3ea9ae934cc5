"""RankPlan and LayerSpec: plain data, the one thing that `alloc` and `engine` share.

A plan says of every linear layer of the decoder blocks what it becomes. It is JSON that can be read,
compared and edited by hand; `rankwise compress --plan` accepts one.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.files import read_json, write_json

FORMAT = 1
KINDS = ("dense", "lowrank", "pivot")
WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
INDEX_BYTES = 4  # pivot_index is int32


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
        weights: how numbers are stored: `bf16`, `fp16` or `fp32`.
        energy: share of the metric's energy kept, 0..1 (None if unknown).
        loss: predicted increase of the loss, nats a token, by the curvature's quadratic model (None if unknown).
        indices: the kept components, rising, where they are not the first `rank` (any-k selection); else None.
    """

    kind: str
    out_features: int
    in_features: int
    rank: int
    weights: str = "bf16"
    energy: float | None = None
    loss: float | None = None
    indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RankwiseError("kind", self.kind, f"allowed: {', '.join(KINDS)}")
        if self.weights not in WEIGHT_BYTES:
            raise RankwiseError("weights", self.weights, f"allowed: {', '.join(WEIGHT_BYTES)}")
        for name in ("out_features", "in_features", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RankwiseError(name, value, "allowed: a whole number from 1")
        for name in ("energy", "loss"):
            check_number(name, getattr(self, name))
        if self.rank > self.full_rank:
            raise RankwiseError("rank", self.rank, f"allowed: 1 to {self.full_rank}")
        self._check_indices()
        if self.kind == "pivot" and self.rank == self.full_rank:
            raise RankwiseError("rank", self.rank, f"as large as dense; allowed for pivot: 1 to {self.full_rank - 1}")
        if self.parameters > self.dense_parameters:
            allowed = self.dense_parameters // (self.out_features + self.in_features)
            raise RankwiseError("rank", self.rank, f"larger than dense; allowed for lowrank: 1 to {allowed}")

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

    @property
    def full_rank(self) -> int:
        """min(m, n)."""
        return min(self.out_features, self.in_features)

    @property
    def dense_parameters(self) -> int:
        """m·n."""
        return self.out_features * self.in_features

    @property
    def parameters(self) -> int:
        """Numbers stored (bias and the pivots' index not counted)."""
        return layer_parameters(self.kind, self.rank, self.out_features, self.in_features)

    @property
    def ratio(self) -> float:
        """Share of the layer's parameters kept."""
        return self.parameters / self.dense_parameters

    @property
    def bytes(self) -> int:
        """Bytes of the stored numbers, index included, bias not."""
        index = self.out_features * INDEX_BYTES if self.kind == "pivot" else 0
        return self.parameters * WEIGHT_BYTES[self.weights] + index


@dataclass
class RankPlan:
    """One LayerSpec per linear layer of the decoder blocks, and where the plan came from.

    Args:
        layers: module name to spec, in model order.
        other_bytes: bytes of everything else in the checkpoint: embeddings, head, norms, biases, guards.
        provenance: base model, method, options, seed, text, versions, measured perplexities.
        factors: handle on the factors that the plan was made from; lives in memory only.
    """

    layers: dict[str, LayerSpec]
    other_bytes: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    factors: Any = field(default=None, repr=False, compare=False)

    def __iter__(self) -> Iterator[tuple[str, LayerSpec]]:
        return iter(self.layers.items())

    @property
    def parameters(self) -> int:
        """Numbers stored by all linear layers."""
        return sum(spec.parameters for spec in self.layers.values())

    @property
    def dense_parameters(self) -> int:
        """Numbers that the same layers held before."""
        return sum(spec.dense_parameters for spec in self.layers.values())

    @property
    def ratio(self) -> float:
        """Share of the linear layers' parameters kept; 1 if none is listed."""
        return self.parameters / self.dense_parameters if self.layers else 1.0

    @property
    def bytes(self) -> int:
        """Bytes of all linear layers."""
        return sum(spec.bytes for spec in self.layers.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole checkpoint's tensors."""
        return self.bytes + self.other_bytes

    @property
    def compressed(self) -> dict[str, LayerSpec]:
        """The layers that do not stay dense."""
        return {name: spec for name, spec in self if spec.kind != "dense"}

    def counts(self) -> dict[str, int]:
        """Layers per kind."""
        return {kind: sum(spec.kind == kind for _, spec in self) for kind in KINDS}

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        layers = {name: _entry(spec) for name, spec in self}
        return {
            "format": FORMAT,
            "ratio": self.ratio,
            "other_bytes": self.other_bytes,
            "layers": layers,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: Any, source: str = "plan") -> "RankPlan":
        """Read a plan back; `source` names it in errors."""
        if not isinstance(data, Mapping) or not isinstance(data.get("layers"), Mapping) or not data["layers"]:
            raise RankwiseError(source, "no layers in it", "a rankwise plan holds a `layers` object")
        check_format(data.get("format"), source)
        layers = {name: _spec(name, entry, source) for name, entry in data["layers"].items()}
        other_bytes, provenance = data.get("other_bytes", 0), data.get("provenance", {})
        if not isinstance(other_bytes, int) or isinstance(other_bytes, bool) or other_bytes < 0:
            raise RankwiseError(f"{source}: other_bytes", other_bytes, "allowed: a whole number from 0")
        if not isinstance(provenance, dict):
            raise RankwiseError(f"{source}: provenance", provenance, "allowed: an object")
        return cls(layers, other_bytes, provenance)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "RankPlan":
        """Read a plan that `save` or a text editor wrote."""
        return cls.from_dict(read_json(Path(path)), str(path))


def check_number(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number or None."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not number:
        raise RankwiseError(name, value, "allowed: a finite number, or null")


def check_format(found: Any, source: str) -> None:
    """Raise unless `found` is a checkpoint format that this version reads."""
    if found != FORMAT:
        hint = "upgrade rankwise" if isinstance(found, int) and found > FORMAT else "write it again"
        raise RankwiseError(source, f"format {found!r}", f"this version reads format {FORMAT}: {hint}")


def _entry(spec: LayerSpec) -> dict[str, Any]:
    """A spec as JSON-ready data; `indices` only where there are some."""
    return {key: value for key, value in asdict(spec).items() if key != "indices" or value is not None}


def _spec(name: str, entry: Any, source: str) -> LayerSpec:
    try:
        return LayerSpec(**entry)
    except RankwiseError as error:
        raise RankwiseError(f"{source}: {name}.{error.field}", error.value, error.allowed) from None
    except TypeError as error:
        raise RankwiseError(f"{source}: {name}", str(error), "see LayerSpec for the fields") from None
