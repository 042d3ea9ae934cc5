"""The `Rounding` that knows the curvature: layer by layer, resumable, each layer's codes in a file of its own."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.channels import Channels
from rankwise.alloc.curvature import Curvature
from rankwise.alloc.rounding import Rounded, round_dense, round_lowrank, round_pivot
from rankwise.alloc.scales import Grid
from rankwise.errors import RankwiseError
from rankwise.files import read_tensors, write_tensors
from rankwise.layerspec import LayerSpec
from rankwise.quantize import stored_tensors
from rankwise.storage import Precision

Tensors = dict[str, torch.Tensor]
PARTS = {"weight": "weight", "lowrank_u": "u", "lowrank_v": "v", "pivot_basis": "basis", "pivot_coeff": "coeff"}


class Rounder:
    """Rounds a layer so that its output changes least (`alloc.rounding`); used as `pipeline.compress(rounding=)`.

    Args:
        curvature: of the model; output gradients are used if it has them.
        blocks: per decoder block, the names of its layers.
        folder: finished layers lie here, under a name that their numbers and the curvature decide.
        dense: name to the weight `[m, n]` whose output a layer is to repeat; None: the layer's own, not rounded.
            Factors that were fitted to something else than that weight must not be pulled back to it.
        device: where it computes.
        held_out: of the dense model on other text; its C is what the guards of `alloc.rounding` go by.
        channels: those that the layers keep; None: all.
    """

    def __init__(
        self,
        curvature: Curvature,
        blocks: list[list[str]],
        folder: Path,
        dense: Callable[[str], torch.Tensor] | None = None,
        device: torch.device | None = None,
        held_out: Curvature | None = None,
        channels: Channels | None = None,
    ) -> None:
        self.curvature, self.folder, self.dense, self.device = curvature, folder, dense, device or torch.device("cpu")
        self.held_out, self.channels = held_out, channels
        self._block = {name: index for index, names in enumerate(blocks) for name in names}
        self._at = -1
        self._moments: tuple[Tensors, Tensors, Tensors] = {}, {}, {}

    def __call__(self, name: str, matrices: Tensors, spec: LayerSpec) -> Tensors:
        """The stored tensors of a layer, by their names below the module; see `quantize.Rounding`.

        Raises:
            RankwiseError: NaN, Inf or moments that do not fit; the field names the layer.
        """
        weight = None if self.dense is None or spec.kind == "dense" else self.dense(name)
        path = self.folder / f"{name}-{self._key(name, matrices, weight, spec)}.safetensors"
        if path.exists():
            return read_tensors(path)
        try:
            rounded = self._round(name, matrices, weight, spec)
        except RankwiseError as error:
            raise RankwiseError(f"{name}: {error.field}", error.value, error.allowed) from None
        stored: Tensors = {}
        for part in spec.matrices:
            found = stored_tensors(rounded.tensors[PARTS[part]])
            stored |= {part + suffix: tensor.cpu().contiguous() for suffix, tensor in found.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, stored, {})
        return stored

    def _round(self, name: str, matrices: Tensors, weight: torch.Tensor | None, spec: LayerSpec) -> Rounded:
        parts = {part: tensor.to(self.device) for part, tensor in matrices.items()}
        target = _product(parts) if weight is None else weight.to(self.device).float()
        metric = grid_of(spec.precision), *self._of(name)
        if spec.kind == "dense":
            return round_dense(target, *metric)
        if spec.kind == "lowrank":
            return round_lowrank(target, parts["lowrank_u"].float(), parts["lowrank_v"].float(), *metric)
        basis, coeff = parts["pivot_basis"].float(), parts["pivot_coeff"].float()
        return round_pivot(target, parts["pivot_index"], basis, coeff, *metric)

    def _of(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """C, F and held-out C of a layer; those of its block stay in memory until another block's are asked for."""
        if self._block[name] != self._at:
            self._at = self._block[name]
            held_out = self.held_out.metric_inputs(self._at) if self.held_out else {}
            self._moments = *self.curvature.metric(self._at), held_out
        inputs, outputs, held_out = self._moments
        c, f, judge = inputs[name], outputs.get(name), held_out.get(name)
        if self.channels is not None:
            c, f = self.channels.restrict(name, c, f)
            judge = None if judge is None else self.channels.restrict(name, judge, None)[0]
        return c, f, judge

    def _key(self, name: str, matrices: Tensors, weight: torch.Tensor | None, spec: LayerSpec) -> str:
        """Of everything that decides the codes."""
        facts: dict[str, Any] = {"spec": [spec.kind, spec.rank, asdict(spec.precision)]}
        facts |= {"curvature": self.curvature.identity, "held_out": self.held_out and self.held_out.identity}
        if self.channels is not None and self.channels.touches(name):
            facts["channels"] = self.channels.identity
        said = hashlib.blake2b(json.dumps(facts).encode(), digest_size=12)
        for tensor in (*(matrices[part] for part in sorted(matrices)), *([] if weight is None else [weight])):
            said.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return said.hexdigest()


def grid_of(precision: Precision) -> Grid:
    """A precision of 4 or 8 bits as the rounding has it."""
    group = None if precision.weights == "int8" else precision.block
    return Grid(precision.weights, group, not precision.asymmetric)


def _product(parts: Tensors) -> torch.Tensor:
    """The matrix `[m, n]` fp32 that a layer's matrices stand for."""
    if "weight" in parts:
        return parts["weight"].float()
    if "lowrank_u" in parts:
        return parts["lowrank_u"].float() @ parts["lowrank_v"].float()
    basis, coeff = parts["pivot_basis"].float(), parts["pivot_coeff"].float()
    return torch.cat([basis, coeff @ basis])[parts["pivot_index"].long()]
