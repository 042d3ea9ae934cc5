"""From a model and text to curvature and factors, and between them to the channels that stay."""

from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.curvature import Curvature, collect
from rankwise.alloc.methods.base import Method
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.alloc.widths import choose_channels
from rankwise.errors import RankwiseError
from rankwise.files import digest
from rankwise.progress import Track, silent
from rankwise.zoo import resolve_device


def measure_factors(
    model: Any,
    inputs: torch.Tensor,
    gradients: torch.Tensor | None,
    method: Method,
    moments: Path,
    factors: Path,
    device: str,
    seed: int,
    track: Track,
    planned: dict[str, int] | None = None,
) -> tuple[FactorStore, Curvature]:
    """Curvature into the folder `moments`, then `make_factors`; `gradients` None: no output gradients."""
    target = resolve_device(device)
    curvature = collect(model, inputs, gradients, moments, device=target, seed=seed, track=track)
    window = inputs[:1]
    return make_factors(model, curvature, method, window, factors, planned, device=target, track=track), curvature


def factors_name(method: Method) -> str:
    """A folder's name: where channels may go, the whole method decides what is factored."""
    return f"factors-{method.sides}" + (f"-{digest(method.options(), 8)}" if method.width_multiple else "")


def make_factors(
    model: Any,
    curvature: Curvature,
    method: Method,
    window: torch.Tensor,
    folder: Path,
    planned: dict[str, int] | None = None,
    *,
    device: torch.device,
    track: Track = silent,
) -> FactorStore:
    """Factors of what a method leaves of the layers; which channels those are goes into a folder beside.

    Args:
        model: dense, in host memory.
        curvature: of the model.
        method: decides the metric, and which channels go.
        window: `[1, T]` token ids.
        folder: for the factors; channels and spectra go into folders beside it.
        planned: as of `choose_channels`; the method has no say then.
        device: where it computes.
        track: progress.
    """
    channels = None
    if planned or (planned is None and method.width_multiple > 0):
        if not method.two_sided:
            raise RankwiseError("sides", method.sides, "allowed: two, for a plan whose MLPs have lost channels")
        where: dict[str, Any] = {"device": device, "planned": planned, "track": track}
        channels = choose_channels(model, curvature, method, window, folder.parent, **where)
    sides = str(method.sides)
    return factorize_model(model, curvature, folder, sides=sides, device=device, channels=channels, track=track)
