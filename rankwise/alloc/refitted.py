"""Refitted factors on disk: one safetensors file a block, read like a FactorStore."""

import json
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.solve import Outcome, Tensors, product
from rankwise.alloc.store import FactorStore
from rankwise.files import open_tensors, read_tensors, write_tensors
from rankwise.jobs import claim


class Refitted:
    """New factors of the plan's own ranks, and new weights of layers that stay dense.

    Args:
        folder: where the files are, or will be.
        base: the factors that were refitted.
        identity: what the refit belongs to, as JSON-ready data.

    Raises:
        RankwiseError: the folder belongs to another refit.
    """

    def __init__(self, folder: Path, base: FactorStore, identity: dict[str, Any]) -> None:
        self.folder, self.base, self.identity = folder, base, identity
        self._block = {name: index for index, block in enumerate(base.layers) for name in block}
        claim(folder, "refit", identity)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name to (out, in), in model order."""
        return self.base.shapes

    def file(self, index: int) -> Path:
        """The file of block `index`."""
        return self.folder / f"refit_{index:03d}.safetensors"

    def write(self, index: int, layers: dict[str, Tensors], outcomes: dict[str, Outcome]) -> None:
        """Keep one block's tensors and what became of its layers."""
        tensors = {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
        write_tensors(self.file(index), tensors, {"outcomes": json.dumps(outcomes)})

    def load(self, name: str, rank: int, indices: tuple[int, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """u `[m, k]` and v `[k, n]`, fp32; they have the plan's rank, so `rank` and `indices` say nothing more."""
        with open_tensors(self.file(self._block[name])) as file:
            return file.get_tensor(f"{name}.u"), file.get_tensor(f"{name}.v")

    def weight(self, name: str, dense: torch.Tensor) -> torch.Tensor:
        """The weight `[m, n]` of a layer that stays dense: the new one in fp32, or what is left of the old one."""
        with open_tensors(self.file(self._block[name])) as file:
            key = f"{name}.weight"
            new = file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118
        return self.base.weight(name, dense) if new is None else new.to(dense.device)

    def rows(self, name: str) -> torch.Tensor | None:
        """The outputs that a layer keeps; None: all."""
        return self.base.rows(name)

    def tensors(self, index: int) -> dict[str, Tensors]:
        """Every layer's tensors of one block; layers that were not changed, and are not factored, are absent."""
        layers: dict[str, Tensors] = {}
        for key, tensor in read_tensors(self.file(index)).items():
            name, _, part = key.rpartition(".")
            layers.setdefault(name, {})[part] = tensor
        return layers

    def weights(self, index: int) -> Tensors:
        """The matrices `[m, n]` fp32 that `tensors` stand for."""
        return {name: product(tensors) for name, tensors in self.tensors(index).items()}

    def outcomes(self) -> dict[str, Outcome]:
        """Layer to what became of it, of the blocks that are done."""
        found: dict[str, Outcome] = {}
        for index in range(len(self.base.layers)):
            if self.file(index).exists():
                with open_tensors(self.file(index)) as file:
                    found |= {name: Outcome(*pair) for name, pair in json.loads(file.metadata()["outcomes"]).items()}
        return found
