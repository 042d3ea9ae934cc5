"""One layer of a checkpoint inside one of vLLM's: its share on this rank, and how it is filled as tensors arrive."""

from typing import Any

import torch

from rankwise.engine.doors.vllm.shares import Cut, share, take, take_pivots
from rankwise.engine.layers import build_layer, tensor_shapes
from rankwise.errors import RankwiseError
from rankwise.layerspec import LayerSpec

GUARD = "weight"


class Part:
    """One layer of a checkpoint, of which this rank holds a share.

    Args:
        name: of the layer, for messages.
        spec: of the whole layer.
        cut: what this rank has of it.
        ranks: among which its inputs are split.
        dtype: that the model runs in.
        device: of the weights.

    Raises:
        RankwiseError: the layer cannot be split so.
    """

    def __init__(
        self, name: str, spec: LayerSpec, cut: Cut, ranks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name, self.spec, self.cut = name, spec, cut
        self.module = build_layer(share(name, spec, cut, ranks), False, dtype, device)
        self.shapes = tensor_shapes(spec)
        self.arrived: set[str] = set()
        self.chosen: torch.Tensor | None = None
        self.early: dict[str, torch.Tensor] = {}

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Take what belongs to this rank of one of the layer's tensors.

        Args:
            name: below the layer, e.g. `lowrank_u_nf4`.
            tensor: whole, as on disk.

        Raises:
            RankwiseError: a tensor that the layer has not, or of another shape or kind of number.
        """
        self._check(name, tensor)
        self.arrived.add(name)
        if name == GUARD and self.spec.recoded:
            return
        if name == "pivot_index":
            places, self.chosen = take_pivots(tensor, self.spec.rank, self.cut)
            self._copy(name, places)
            for kept in list(self.early):
                self._coefficients(kept, self.early.pop(kept))
        elif name.startswith("pivot_coeff"):
            if self.chosen is None:  # files are free in their order; loaders may reuse a tensor's memory
                self.early[name] = tensor.clone()
            else:
                self._coefficients(name, tensor)
        else:
            self._copy(name, take(tensor, name, self.spec, self.cut))

    def finish(self, dummy: bool = False) -> None:
        """All tensors are there; let go of rows that were kept free for coefficients.

        Args:
            dummy: vLLM was asked for random weights.

        Raises:
            RankwiseError: a tensor is missing.
        """
        missing = sorted(self.shapes.keys() - self.arrived)
        if missing and not dummy:
            raise RankwiseError(f"{self.name}.{missing[0]}", "not in the checkpoint", "write the checkpoint again")
        if self.chosen is None:
            return
        rows = max(1 if self.spec.quantised else 0, len(self.chosen))
        for name in self.shapes:
            if name.startswith("pivot_coeff"):
                mine = self._tensor(name)
                mine.data = mine.data[:rows].clone()

    def _coefficients(self, name: str, tensor: torch.Tensor) -> None:
        assert self.chosen is not None
        rows = tensor.index_select(0, self.chosen.to(tensor.device))
        self._tensor(name).data[: len(rows)].copy_(rows)

    def _copy(self, name: str, tensor: torch.Tensor) -> None:
        self._tensor(name).data.copy_(tensor)

    def _tensor(self, name: str) -> Any:
        return getattr(self.module, name)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        where, found = f"{self.name}.{name}", tuple(tensor.shape)
        if name not in self.shapes:
            raise RankwiseError(where, "not expected", f"config.json says {self.spec.kind}, {self.spec.precision}")
        if found != self.shapes[name]:
            raise RankwiseError(where, f"shape {list(found)}", f"config.json says shape {list(self.shapes[name])}")
        stored = self.spec.tensors.get(name)
        if self.spec.quantised and stored and tensor.dtype != getattr(torch, stored.dtype):
            raise RankwiseError(where, str(tensor.dtype), f"config.json says {stored.dtype}")
        if name == "pivot_index" and not torch.equal(tensor.sort().values.cpu(), torch.arange(len(tensor)).int()):
            raise RankwiseError(where, "no permutation", "the tensor is damaged; write the checkpoint again")
