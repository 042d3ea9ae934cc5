"""RankPlan: plain data, the one thing that `alloc` and `engine` share, made of `LayerSpec`s.

A plan says of every linear layer of the decoder blocks what it becomes. It is JSON that can be read,
compared and edited by hand; `rankwise compress --plan` accepts one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.files import read_json, write_json
from rankwise.layerspec import KINDS, LayerSpec, layer_parameters
from rankwise.storage import EMBEDDINGS, Precision

__all__ = ["FORMAT", "KINDS", "LayerSpec", "RankPlan", "check_embeddings", "check_format", "layer_parameters"]

FORMAT = 1
# fields that JSON carries only where they are set
OPTIONAL = {"indices": None, "group": None, "asymmetric": False, "dense_shape": None}


@dataclass
class RankPlan:
    """One LayerSpec per linear layer of the decoder blocks, and where the plan came from.

    Args:
        layers: module name to spec, in model order.
        other_bytes: bytes of everything else in the checkpoint: embeddings, head, norms, biases, guards.
        provenance: base model, method, options, seed, text, versions, measured perplexities.
        factors: handle on the factors that the plan was made from; lives in memory only.
        embeddings: what the embedding table, and a head that is not tied to it, are stored in, by module name; empty:
            as the dense model has them. Their bytes are among `other_bytes`.
    """

    layers: dict[str, LayerSpec]
    other_bytes: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    factors: Any = field(default=None, repr=False, compare=False)
    embeddings: dict[str, str] = field(default_factory=dict)

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
        """The layers that do not stay as they were: factored, narrowed, or stored in 4 or 8 bits."""
        return {name: spec for name, spec in self if spec.compressed}

    @property
    def quantised(self) -> bool:
        """True if the numbers of some layer are stored in 4 or 8 bits."""
        return any(spec.quantised for _, spec in self)

    @property
    def bits(self) -> float:
        """Bits that all linear layers take, for each number that they held before; 0 if none is listed."""
        return 8 * self.bytes / self.dense_parameters if self.layers else 0.0

    @property
    def loss(self) -> float | None:
        """Predicted for all layers, nats a token; None where some layer's is not known."""
        losses = [spec.loss for _, spec in self if spec.loss is not None]
        return sum(losses) if len(losses) == len(self.layers) else None

    def stored_as(self, precision: Precision, keep: Callable[[str], bool] | None = None) -> "RankPlan":
        """The same kinds and ranks, every layer's numbers stored in one way; layers for which `keep` is true stay.

        Raises:
            RankwiseError: its blocks do not divide a layer's sizes; the field names the layer.
        """
        kept = {name for name in self.layers if keep is not None and keep(name)}
        layers = {name: spec if name in kept else _for_layer(name, spec, precision) for name, spec in self}
        return replace(self, layers=layers)

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
            **({"embeddings": self.embeddings} if self.embeddings else {}),
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
        return cls(layers, other_bytes, provenance, embeddings=check_embeddings(data.get("embeddings", {}), source))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "RankPlan":
        """Read a plan that `save` or a text editor wrote."""
        return cls.from_dict(read_json(Path(path)), str(path))


def check_format(found: Any, source: str) -> None:
    """Raise unless `found` is a checkpoint format that this version reads."""
    if found != FORMAT:
        hint = "upgrade rankwise" if isinstance(found, int) and found > FORMAT else "write it again"
        raise RankwiseError(source, f"format {found!r}", f"this version reads format {FORMAT}: {hint}")


def check_embeddings(found: Any, source: str) -> dict[str, str]:
    """`embeddings` of a plan or a config.json, which `source` names in errors."""
    if not isinstance(found, Mapping) or not all(stored in EMBEDDINGS for stored in found.values()):
        raise RankwiseError(f"{source}: embeddings", found, f"allowed: module names, each with {', '.join(EMBEDDINGS)}")
    return {str(name): str(stored) for name, stored in found.items()}


def _entry(spec: LayerSpec) -> dict[str, Any]:
    """A spec as JSON-ready data; optional fields only where they are set."""
    return {key: value for key, value in asdict(spec).items() if key not in OPTIONAL or value != OPTIONAL[key]}


def _for_layer(name: str, spec: LayerSpec, precision: Precision) -> LayerSpec:
    try:
        return spec.stored_as(precision)
    except RankwiseError as error:
        raise RankwiseError(f"{name}.{error.field}", error.value, error.allowed) from None


def _spec(name: str, entry: Any, source: str) -> LayerSpec:
    try:
        return LayerSpec(**entry)
    except RankwiseError as error:
        raise RankwiseError(f"{source}: {name}.{error.field}", error.value, error.allowed) from None
    except TypeError as error:
        raise RankwiseError(f"{source}: {name}", str(error), "see LayerSpec for the fields") from None
