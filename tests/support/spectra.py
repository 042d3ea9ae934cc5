"""Spectra drawn at random, and what rounding would add to them: plans of many layers without a model."""

from dataclasses import dataclass

import numpy as np

from rankwise.alloc.precisions import RoundingTable
from rankwise.storage import Precision

MENU = (Precision("bf16"), Precision("nf4"), *(Precision("int4", group) for group in (32, 64, 128)))


class Whole:
    """Of a model whose layers keep all their channels."""

    shapes: dict[str, tuple[int, int]]

    @property
    def originals(self) -> dict[str, tuple[int, int]]:
        return self.shapes

    @property
    def removed(self) -> dict[str, float]:
        return {}


@dataclass
class Drawn(Whole):
    """Spectra of a deeper model, drawn at random."""

    shapes: dict[str, tuple[int, int]]
    energies: dict[str, np.ndarray]


def drawn(seed: int) -> tuple[Drawn, RoundingTable]:
    generator = np.random.default_rng(seed)
    shapes = {f"{i}.{name}": shape for i in range(30) for name, shape in (("q", (256, 256)), ("up", (704, 256)))}
    energies, layers = {}, {}
    for name, (m, n) in shapes.items():
        full = min(m, n)
        energies[name] = generator.lognormal() * np.exp(-generator.uniform(1, 6) * np.arange(full) / full)
        unit = energies[name].sum() * generator.uniform(0.5, 2) * 1e-3
        layers[name] = {
            str(precision): {
                kind: ([full], [worse * unit]) if kind == "dense" else ([64, 192], [unit / 2, worse * unit])
                for kind, worse in (("dense", 1), ("lowrank", 2), ("pivot", 3))
            }
            for precision in MENU[1:]
        }
    return Drawn(shapes, energies), RoundingTable(layers, {})
