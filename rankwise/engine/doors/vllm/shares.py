"""What one tensor-parallel rank holds of a compressed layer. Knows tensors only, and nothing of vLLM.

A layer split by its outputs (column-parallel) keeps the first factor whole on every rank and cuts the second one by
rows. One split by its inputs (row-parallel) cuts the first factor by columns; what the ranks then have of `V x` are
partial sums, and the second factor is whole.
"""

from dataclasses import dataclass, fields

import torch

from rankwise.errors import RankwiseError
from rankwise.layerspec import LayerSpec

FIRST = {"lowrank": "lowrank_v", "pivot": "pivot_basis"}
Range = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """The outputs and inputs of a layer that one rank has.

    Args:
        rows: half-open ranges of outputs, one after another in the rank's own order.
        columns: half-open range of inputs.
    """

    rows: tuple[Range, ...]
    columns: Range

    @property
    def outputs(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.rows)

    @property
    def inputs(self) -> int:
        """Number of columns."""
        return self.columns[1] - self.columns[0]


@dataclass(frozen=True)
class Share(LayerSpec):
    """A rank's part of a layer, as a spec that the layer classes take; any shape is allowed.

    Args:
        coefficients: rows of a pivot layer's second factor.
    """

    coefficients: int = 0

    def __post_init__(self) -> None:
        """What a whole layer may not be, a part may: its rank may exceed its rows."""

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """As `LayerSpec.matrices`."""
        whole = super().matrices
        return whole | ({"pivot_coeff": (self.coefficients, self.rank)} if self.kind == "pivot" else {})


def share(name: str, spec: LayerSpec, cut: Cut, ranks: int = 1) -> Share:
    """The part of a layer that a cut leaves.

    Args:
        name: of the layer, for messages.
        spec: of the whole layer.
        cut: of this rank.
        ranks: among which the inputs are split.

    Raises:
        RankwiseError: the columns that a rank would have are no whole groups of quantised weights.
    """
    block = spec.precision.block
    if cut.columns[0] % block or cut.columns[1] % block:
        fits = [str(n) for n in range(1, ranks) if spec.in_features % (n * block) == 0]
        what = f"{ranks} (in_features {spec.in_features} stored as {spec.precision})"
        allowed = f"a rank must have whole groups of {block} columns of {name}; allowed: {', '.join(fits)}"
        raise RankwiseError("tensor_parallel_size", what, allowed)
    whole = {field.name: getattr(spec, field.name) for field in fields(LayerSpec)}
    most = min(spec.out_features - spec.rank, cut.outputs) if spec.kind == "pivot" else 0
    if spec.kind == "pivot" and spec.quantised:
        most = max(1, most)
    part = {"out_features": cut.outputs, "in_features": cut.inputs, "indices": None, "coefficients": most}
    return Share(**(whole | part))


def take(tensor: torch.Tensor, name: str, spec: LayerSpec, cut: Cut) -> torch.Tensor:
    """A rank's part of one of a layer's tensors; pivots and their coefficients are `take_pivots`'s.

    Args:
        tensor: whole.
        name: below the module, e.g. `lowrank_u_nf4`.
        spec: of the whole layer.
        cut: of this rank.

    Returns:
        A view where one range of rows is taken, else a copy.
    """
    first = name.startswith((FIRST.get(spec.kind, "weight"), "weight"))
    if first and tensor.shape[1] > 1:  # packed codes and scales have fewer columns than numbers; one scale stays whole
        width, whole = tensor.shape[1], spec.in_features
        tensor = tensor[:, cut.columns[0] * width // whole : cut.columns[1] * width // whole]
    if first and spec.kind != "dense":
        return tensor
    pieces = [tensor[start:stop] for start, stop in cut.rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def take_pivots(index: torch.Tensor, rank: int, cut: Cut) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of a pivot layer's coefficients a rank needs, and its outputs' places among pivots and those.

    Args:
        index: `[m]`, of the whole layer.
        rank: k.
        cut: of this rank.

    Returns:
        The rank's index `[outputs]`, and the chosen rows of the coefficients, both int64 on the host.
    """
    places = torch.cat([index[start:stop] for start, stop in cut.rows]).long().cpu()
    combined = places >= rank
    chosen = places[combined] - rank
    places[combined] = rank + torch.arange(len(chosen))
    return places, chosen
