"""What each kind, rank and precision of each layer would cost in loss through rounding: expected, then corrected.

`expected.py` is evaluated at a few ranks a layer and interpolated between them. On the layers of a few blocks the
rounding is carried out, and for each kind and precision the ratio of what it costs there to what was expected corrects
all layers. The table is made block by block and kept in a folder, so that any budget can be planned from it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankwise.alloc.curvature import Curvature
from rankwise.alloc.expected import expected_dense, expected_lowrank, expected_pivot, fits
from rankwise.alloc.feedback import triangle
from rankwise.alloc.pivots import pivot_form
from rankwise.alloc.rounder import grid_of
from rankwise.alloc.rounding import round_dense, round_lowrank, round_pivot
from rankwise.alloc.store import FactorStore
from rankwise.anatomy import block_linears, weight_of
from rankwise.files import read_json, write_json
from rankwise.jobs import claim
from rankwise.plan import layer_parameters
from rankwise.progress import Track, silent
from rankwise.storage import Precision

AT = (0.125, 0.375, 0.625, 0.875)  # shares of the full rank at which factors are looked at
TRIED = 1  # which of them is rounded in the sample
RANKS = 128  # that every format's groups divide: ranks that are looked at are multiples of it where they can be
SAMPLE = 2  # blocks whose layers are rounded, of eight or more
BOUNDS = (0.1, 10.0)  # a correction outside says that a sample was too small, not more

Curve = tuple[list[int], list[float]]  # ranks, and the loss at each


class RoundingTable:
    """Loss that rounding adds, nats a token by the second-order estimate.

    Args:
        layers: name to precision to `dense`, `lowrank` and `pivot` to a curve over ranks (dense: of one point).
        ratios: kind and precision, as `"lowrank int4 by 64"`, to measured over expected on the sample.
    """

    def __init__(self, layers: dict[str, dict[str, dict[str, Curve]]], ratios: dict[str, float]) -> None:
        self.layers, self.ratios = layers, ratios

    def knows(self, name: str, kind: str, precision: Precision) -> bool:
        """Whether a layer can be rounded so, or is not rounded."""
        return not precision.quantised or kind in self.layers[name].get(str(precision), {})

    def loss(self, name: str, kind: str, ranks: np.ndarray, precision: Precision) -> np.ndarray:
        """Of a layer at some ranks `[c]`; nothing where numbers are not rounded."""
        if not precision.quantised:
            return np.zeros(len(ranks))
        at, losses = self.layers[name][str(precision)][kind]
        scale = self.ratios.get(f"{kind} {precision}", 1.0)
        if kind == "dense":
            return np.full(len(ranks), scale * losses[0])
        return scale * np.interp(ranks, [0, *at], [0.0, *losses])


@torch.no_grad()
def measure_rounding(
    model: Any,
    curvature: Curvature,
    store: FactorStore,
    precisions: Sequence[Precision],
    kinds: Sequence[str],
    folder: Path,
    *,
    device: torch.device,
    track: Track = silent,
) -> RoundingTable:
    """Make the table, or finish what `folder` holds of it.

    Args:
        model: dense, in host memory.
        curvature: of the model.
        store: its factors.
        precisions: those to choose from; the ones that do not round are passed over.
        kinds: likewise.
        folder: one file a block.
        device: where it computes.
        track: progress.
    """
    rounding = [precision for precision in precisions if precision.quantised]
    names = [str(precision) for precision in rounding]
    claim(folder, "rounding", {"precisions": names, "kinds": list(kinds), **curvature.identity, **store.identity})
    blocks = block_linears(model)
    several = SAMPLE if len(blocks) >= 8 else 1
    sample = [(2 * i + 1) * len(blocks) // (2 * several) for i in range(several)]
    layers: dict[str, dict[str, dict[str, Curve]]] = {}
    pairs: dict[str, list[tuple[float, float]]] = {}
    with track("precisions", len(blocks)) as advance:
        for index, block in enumerate(blocks):
            path = folder / f"rounding_{index:03d}.json"
            if not path.exists():
                look = _Look(curvature, store, rounding, kinds, index, device)
                found = {name: look.layer(name, weight_of(linear), index in sample) for name, linear in block.items()}
                write_json(path, found)
            for name, entry in read_json(path).items():
                layers[name] = entry["expected"]
                for key, pair in entry["sample"].items():
                    pairs.setdefault(key, []).append(pair)
            advance()
    return RoundingTable(layers, {key: _ratio(found) for key, found in pairs.items()})


def _ratio(pairs: list[tuple[float, float]]) -> float:
    expected, measured = (sum(column) for column in zip(*pairs, strict=True))
    return float(np.clip(measured / expected, *BOUNDS)) if expected > 0 else 1.0


class _Look:
    """One block's curvature, and what is asked of each of its layers."""

    def __init__(
        self,
        curvature: Curvature,
        store: FactorStore,
        precisions: Sequence[Precision],
        kinds: Sequence[str],
        index: int,
        device: torch.device,
    ) -> None:
        self.precisions, self.kinds, self.store, self.device = precisions, kinds, store, device
        self.inputs, self.outputs = curvature.metric(index)
        if store.channels is not None:
            pairs = {name: store.channels.restrict(name, c, self.outputs.get(name)) for name, c in self.inputs.items()}
            self.inputs = {name: c for name, (c, _) in pairs.items()}
            self.outputs = {name: f for name, (_, f) in pairs.items() if f is not None}

    def layer(self, name: str, weight: torch.Tensor, sampled: bool) -> dict[str, Any]:
        """Expected losses by precision and kind, and in the sample pairs (expected, measured)."""
        weight = self.store.weight(name, weight.to(self.device)).double()
        c = self.inputs[name].to(weight)
        f = self.outputs[name].to(weight) if name in self.outputs else None
        metric = (c, triangle(c)), None if f is None else (f, triangle(f))
        usable = [precision for precision in self.precisions if fits(weight, grid_of(precision))]
        curves: dict[str, dict[str, Curve]] = {str(precision): {} for precision in usable}
        grids = [grid_of(precision) for precision in usable]
        if "dense" in self.kinds:
            losses = expected_dense(weight, grids, metric[0][1], None if metric[1] is None else metric[1][1])
            for precision, loss in zip(usable, losses, strict=True):
                curves[str(precision)]["dense"] = [min(weight.shape)], [loss]
        for kind in ("lowrank", "pivot"):
            if kind in self.kinds:
                self._factored(kind, name, weight.shape, usable, metric, curves)
        pairs = self._sample(name, weight, usable, curves) if sampled else {}
        return {"expected": curves, "sample": pairs}

    def _factored(
        self, kind: str, name: str, shape: torch.Size, usable: list[Precision], metric: Any, curves: dict[str, Any]
    ) -> None:
        expected = expected_lowrank if kind == "lowrank" else expected_pivot
        grids = [grid_of(precision) for precision in usable]
        for rank in _ranks(*shape):
            u, v = (t.to(self.device).double() for t in self.store.load(name, rank))
            for precision, loss in zip(usable, expected(u, v, grids, *metric), strict=True):
                if np.isfinite(loss):
                    at, losses = curves[str(precision)].setdefault(kind, ([], []))
                    at.append(rank)
                    losses.append(loss)

    def _sample(
        self, name: str, weight: torch.Tensor, usable: list[Precision], curves: dict[str, Any]
    ) -> dict[str, tuple[float, float]]:
        """Round the layer in every kind and precision: expected and measured loss of the rounding alone."""
        moments = self.inputs[name], self.outputs.get(name)
        pairs: dict[str, tuple[float, float]] = {}
        for precision in usable:
            grid = grid_of(precision)
            for kind, (ranks, losses) in curves[str(precision)].items():
                at = min(TRIED, len(ranks) - 1)
                if kind == "dense":
                    measured = round_dense(weight, grid, *moments).loss
                else:
                    measured = self._rounded(kind, name, weight, ranks[at], grid, moments)
                pairs[f"{kind} {precision}"] = losses[at], max(0.0, measured)
        return pairs

    def _rounded(self, kind: str, name: str, weight: torch.Tensor, rank: int, grid: Any, moments: Any) -> float:
        u, v = (t.to(self.device) for t in self.store.load(name, rank))
        if kind == "lowrank":
            loss = round_lowrank(weight, u, v, grid, *moments).loss
        else:
            index, basis, coeff = pivot_form(u, v)
            loss = round_pivot(weight, index, basis, coeff, grid, *moments).loss
        return loss - float(self.store.energies[name][rank:].sum()) / 2


def _ranks(out_features: int, in_features: int) -> list[int]:
    """Ranks to look at, below the full one, whose groups the widest format divides where the layer is wide enough."""
    full = min(out_features, in_features)
    step = next(size for size in (RANKS, 64, 32, 16, 8, 1) if size < full)
    ranks = {min(max(round(share * full / step), 1) * step, (full - 1) // step * step) for share in AT}
    return sorted(rank for rank in ranks if layer_parameters("pivot", rank, out_features, in_features) > 0)
