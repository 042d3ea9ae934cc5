"""What a method that looks at the model, and not at spectra alone, is given to look with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.budget import Choices
from rankwise.alloc.curvature import Curvature
from rankwise.alloc.store import FactorStore
from rankwise.progress import Track, silent


@dataclass
class Calibration:
    """A model, its factors, and text to learn from.

    Args:
        model: the dense causal language model, in host memory; a method leaves it as it found it.
        factors: full-rank factors of every linear layer, in the method's own metric.
        curvature: the second moments that the factors were made from.
        windows: `[N, T]` token ids to learn from; none of them is used to judge the result.
        folder: what a method wants to find again after a kill lies here.
        device: where to compute.
        seed: fixes everything drawn at random.
        track: progress.
        learnt: what `Method.allocate` leaves here: every layer's choices with the losses that were learnt.
    """

    model: Any
    factors: FactorStore
    curvature: Curvature
    windows: torch.Tensor
    folder: Path
    device: torch.device
    seed: int = 0
    track: Track = silent
    learnt: dict[str, Choices] | None = None
