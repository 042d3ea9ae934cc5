"""Which channels the MLPs of a model keep, on disk, and what the layers are without the others."""

import json
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.mlps import Mlp
from rankwise.files import open_tensors, write_tensors

Shapes = list[dict[str, tuple[int, int]]]


class Channels:
    """One safetensors file a block; a block that keeps all its channels has an empty one.

    Args:
        folder: where the files are, or will be.
        originals: per block, layer name to (out, in) in the dense model.
        identity: what the choice belongs to, as JSON-ready data.
    """

    def __init__(self, folder: Path, originals: Shapes, identity: dict[str, Any]) -> None:
        self.folder, self.originals, self.identity = folder, originals, identity
        self._block = {name: index for index, block in enumerate(originals) for name in block}

    def file(self, index: int) -> Path:
        """The file of block `index`."""
        return self.folder / f"channels_{index:03d}.safetensors"

    def write(self, index: int, mlp: Mlp | None, kept: torch.Tensor, reader: torch.Tensor, loss: float) -> None:
        """Keep what becomes of a block.

        Args:
            index: the block.
            mlp: its layers; None: nothing is taken out.
            kept: channels, rising.
            reader: the new weight `[m, |kept|]` of the layer that reads them.
            loss: predicted, nats a token.
        """
        tensors: dict[str, torch.Tensor] = {}
        if mlp is not None:
            tensors |= {f"{name}.rows": kept.int().clone() for name in mlp.writers}
            tensors |= {f"{mlp.reader}.columns": kept.int().clone(), f"{mlp.reader}.weight": reader.float()}
        losses = {} if mlp is None else {mlp.reader: loss}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(self.file(index), tensors, {"losses": json.dumps(losses)})

    @property
    def shapes(self) -> Shapes:
        """Per block, layer name to (out, in) as they are now."""
        return [{name: self._shape(name, shape) for name, shape in block.items()} for block in self.originals]

    @property
    def losses(self) -> dict[str, float]:
        """Layer that lost columns to the predicted loss of that, nats a token."""
        found: dict[str, float] = {}
        for index in range(len(self.originals)):
            with open_tensors(self.file(index)) as file:
                found |= json.loads(file.metadata()["losses"])
        return found

    def rows(self, name: str) -> torch.Tensor | None:
        """The rows `[m']` that a layer keeps; None: all."""
        return self._get(name, "rows")

    def touches(self, name: str) -> bool:
        """Whether a layer has lost some of its inputs or outputs."""
        return self.rows(name) is not None or self._get(name, "columns") is not None

    def cut(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What is left of a layer's weight `[m, n]`, on its device; the weight itself where all is."""
        if (rows := self.rows(name)) is not None:
            return weight[rows.to(weight.device)]
        new = self._get(name, "weight")
        return weight if new is None else new.to(weight.device)

    def restrict(
        self, name: str, inputs: torch.Tensor, outputs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A layer's C and F, of the features that it still has."""
        columns, rows = self._get(name, "columns"), self.rows(name)
        return among(inputs, columns), None if outputs is None else among(outputs, rows)

    def _shape(self, name: str, shape: tuple[int, int]) -> tuple[int, int]:
        rows, columns = self.rows(name), self._get(name, "columns")
        return shape[0] if rows is None else len(rows), shape[1] if columns is None else len(columns)

    def _get(self, name: str, part: str) -> torch.Tensor | None:
        with open_tensors(self.file(self._block[name])) as file:
            key = f"{name}.{part}"
            found = file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118
        return found.long() if found is not None and part in ("rows", "columns") else found


def among(matrix: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """The rows and columns `kept` of a square matrix; None: all."""
    if kept is None:
        return matrix
    kept = kept.to(matrix.device)
    return matrix[kept][:, kept]
