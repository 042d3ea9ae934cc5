"""Factors of all layers on disk: made once, block by block, then read at any rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankwise.alloc.channels import Channels
from rankwise.alloc.curvature import Curvature
from rankwise.alloc.factors import Factors, factorize_all, factorize_diagonal
from rankwise.anatomy import block_linears, features, weight_of
from rankwise.distributed import barrier, from_main, is_main, own
from rankwise.errors import RankwiseError
from rankwise.files import open_tensors, write_tensors
from rankwise.jobs import claim
from rankwise.progress import Track, silent

Metric = Callable[[dict[str, torch.Tensor]], dict[str, Factors]]  # of layers: name to weight, name to factors


class FactorStore:
    """Full-rank factors of every linear layer, one safetensors file a block.

    Args:
        folder: where the files are, or will be.
        layers: per block, layer name to (out, in) in the dense model.
        channels: what is left of the layers that are factored; None: all.
    """

    def __init__(
        self, folder: Path, layers: list[dict[str, tuple[int, int]]], channels: Channels | None = None
    ) -> None:
        self.folder, self.channels = folder, channels
        self.layers = layers if channels is None else channels.shapes
        self.originals = {name: shape for block in layers for name, shape in block.items()}
        self.removed = {} if channels is None else channels.losses
        self._block = {name: index for index, block in enumerate(layers) for name in block}
        self._energies: dict[str, np.ndarray] = {}
        self.keep_alive: Any = None  # a temporary folder that must outlive the store

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name to (out, in), in model order."""
        return {name: shape for block in self.layers for name, shape in block.items()}

    @property
    def energies(self) -> dict[str, np.ndarray]:
        """Layer name to `[r]` fp64 squared singular values in the metric."""
        if not self._energies:
            for index, block in enumerate(self.layers):
                with open_tensors(self.file(index)) as file:
                    self._energies.update({name: file.get_tensor(f"{name}.energy").numpy() for name in block})
        return self._energies

    @property
    def identity(self) -> dict[str, Any]:
        """What it belongs to beside a curvature and a metric: the channels, where some are gone."""
        return {} if self.channels is None else {"channels": self.channels.identity}

    def weight(self, name: str, dense: torch.Tensor) -> torch.Tensor:
        """What is left of a layer's weight `[m, n]` before it is factored; the weight itself where all is."""
        return dense if self.channels is None else self.channels.cut(name, dense)

    def rows(self, name: str) -> torch.Tensor | None:
        """The outputs that a layer keeps; None: all."""
        return None if self.channels is None else self.channels.rows(name)

    def file(self, index: int) -> Path:
        """The file of block `index`."""
        return self.folder / f"factors_{index:03d}.safetensors"

    def load(self, name: str, rank: int, indices: tuple[int, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A pair of factors, u `[m, k]` and v `[k, n]`, fp32: the first k components, or those in `indices`."""
        if indices is not None:
            kept = list(indices)
            u, v = self.load(name, kept[-1] + 1)
            return u[:, kept].contiguous(), v[kept].contiguous()
        with open_tensors(self.file(self._block[name])) as file:
            left, right = file.get_slice(f"{name}.u"), file.get_slice(f"{name}.v")
            return left[:, :rank].contiguous(), right[:rank].contiguous()


def factorize_model(
    model: Any,
    curvature: Curvature,
    folder: Path,
    *,
    sides: str,
    device: torch.device,
    channels: Channels | None = None,
    track: Track = silent,
) -> FactorStore:
    """Factor every linear layer, or finish what `folder` holds of it; one block's curvature in memory at a time.

    Several processes (`rankwise.distributed`) share out the blocks that are missing; each writes its own.

    Args:
        sides: the metric, one of `factors.SIDES`.
        channels: those that are kept; for two-sided factors.

    Raises:
        RankwiseError: output-gradient moments are asked for and missing, or a matrix is unusable.
    """
    linears = block_linears(model)
    store = FactorStore(folder, [{name: features(m) for name, m in block.items()} for block in linears], channels)
    if sides == "two" and not curvature.has_outputs:
        raise RankwiseError("curvature", str(curvature.folder), "it has no output-gradient moments; use --sides one")
    if is_main():
        claim(folder, "factors", {"sides": sides, **curvature.identity, **store.identity})
    missing = from_main(lambda: [index for index in range(len(linears)) if not store.file(index).exists()])
    mine = {missing[at] for at in own(len(missing))}
    with track("factors", len(linears)) as advance:
        for index, block in enumerate(linears):
            if index in mine:
                weights = {n: store.weight(n, weight_of(linear).to(device)) for n, linear in block.items()}
                metric = metric_of(curvature, index, sides, channels)
                write_tensors(store.file(index), factorize_block(weights, metric), {})
            advance()
    barrier()
    return store


def metric_of(curvature: Curvature, index: int, sides: str, channels: Channels | None) -> Metric:
    """What factors named weights of one block in the metric `sides`."""
    if sides == "diagonal":
        sizes = curvature.magnitudes(index)
        return lambda weights: {name: factorize_diagonal(weight, sizes[name]) for name, weight in weights.items()}
    inputs, outputs = curvature.metric(index) if sides == "two" else (curvature.inputs(index), {})

    def together(weights: dict[str, torch.Tensor]) -> dict[str, Factors]:
        pairs = [(inputs[name], outputs.get(name)) for name in weights]
        if channels is not None:
            pairs = [channels.restrict(name, *pair) for name, pair in zip(weights, pairs, strict=True)]
        return dict(zip(weights, factorize_all(list(weights.values()), *zip(*pairs, strict=True)), strict=True))

    return together


def factorize_block(weights: dict[str, torch.Tensor], metric: Metric) -> dict[str, torch.Tensor]:
    """Factors of one block's layers, in host memory, under their names in the file."""
    try:
        found = metric(weights)
    except (RankwiseError, torch.linalg.LinAlgError):
        found = _one_by_one(weights, metric)
    tensors: dict[str, torch.Tensor] = {}
    for name, factors in found.items():
        parts = {"u": factors.u, "v": factors.v, "energy": factors.energy}
        tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in parts.items()}
    return tensors


def _one_by_one(weights: dict[str, torch.Tensor], metric: Metric) -> dict[str, Factors]:
    """As `metric` would have it; an error names the layer."""
    found: dict[str, Factors] = {}
    for name, weight in weights.items():
        try:
            found |= metric({name: weight})
        except RankwiseError as error:
            raise RankwiseError(f"{name}: {error.field}", error.value, error.allowed) from None
        except torch.linalg.LinAlgError as error:
            raise RankwiseError(name, str(error), "measure the curvature again, on other text") from None
    return found
