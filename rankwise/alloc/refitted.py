"""Refitted factors on disk: one safetensors file a block, read like a FactorStore."""

import json
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.store import FactorStore
from rankwise.errors import RankwiseError
from rankwise.files import differing_keys, open_tensors, read_json, read_tensors, write_json, write_tensors


class Refitted:
    """New factors of the plan's own ranks, and new weights of layers that stay dense.

    Args:
        folder: where the files are, or will be.
        base: the factors that were refitted.
        identity: what the refit belongs to; a folder with another one is refused.
    """

    def __init__(self, folder: Path, base: FactorStore, identity: dict[str, Any]) -> None:
        self.folder, self.base = folder, base
        self._block = {name: index for index, block in enumerate(base.layers) for name in block}
        path = folder / "refit.json"
        if not path.exists():
            if any(folder.glob("refit_*.safetensors")):
                raise RankwiseError("refit", f"{folder} (no {path.name} in it)", "use a new folder, or --restart")
            write_json(path, identity)
        if different := differing_keys(read_json(path), identity):
            raise RankwiseError("refit", f"{folder} was made with other {different}", "use a new folder, or --restart")

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name to (out, in), in model order."""
        return self.base.shapes

    def file(self, index: int) -> Path:
        """The file of block `index`."""
        return self.folder / f"refit_{index:03d}.safetensors"

    def write(self, index: int, tensors: dict[str, torch.Tensor], outcomes: dict[str, Any]) -> None:
        """Keep one block's tensors and what was found."""
        found = {name: [outcome.share, outcome.gain] for name, outcome in outcomes.items()}
        write_tensors(self.file(index), tensors, {"outcomes": json.dumps(found)})

    def load(self, name: str, rank: int, indices: tuple[int, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """u `[m, k]` and v `[k, n]`, fp32; they have the plan's rank, so `rank` and `indices` say nothing more."""
        with open_tensors(self.file(self._block[name])) as file:
            return file.get_tensor(f"{name}.u"), file.get_tensor(f"{name}.v")

    def weight(self, name: str) -> torch.Tensor | None:
        """The new weight `[m, n]` fp32 of a layer that stays dense; None where the old one stays."""
        with open_tensors(self.file(self._block[name])) as file:
            return file.get_tensor(f"{name}.weight") if f"{name}.weight" in file.keys() else None  # noqa: SIM118

    def weights(self, index: int) -> dict[str, torch.Tensor]:
        """Every layer's matrix `[m, n]` fp32 of one block, multiplied out; layers that were not changed are absent."""
        tensors = read_tensors(self.file(index))
        names = {key.rpartition(".")[0] for key in tensors}
        return {
            name: tensors[f"{name}.weight"]
            if f"{name}.weight" in tensors
            else tensors[f"{name}.u"] @ tensors[f"{name}.v"]
            for name in names
        }

    def outcomes(self) -> dict[str, tuple[float | None, float]]:
        """Layer to (share, gain) of `refit.Outcome`, of the blocks that are done."""
        found: dict[str, tuple[float | None, float]] = {}
        for index in range(len(self.base.layers)):
            if self.file(index).exists():
                with open_tensors(self.file(index)) as file:
                    found |= {name: tuple(pair) for name, pair in json.loads(file.metadata()["outcomes"]).items()}
        return found
