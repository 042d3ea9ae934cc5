"""A tiny model with factors, a plan and a refit of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.curvature import Curvature, collect
from rankwise.alloc.methods import Global
from rankwise.alloc.refit import refit
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.alloc.widths import choose_channels
from rankwise.plan import RankPlan

CPU = torch.device("cpu")


@dataclass
class Fit:
    """Everything that a refit goes by, and the refit."""

    model: Any
    curvature: Curvature
    store: FactorStore
    plan: RankPlan
    refitted: Refitted
    judges: torch.Tensor


def make_fit(model: Any, windows: torch.Tensor, folder: Path, method: Global) -> Fit:
    """A refit to three quarters of `windows` `[N, T]`, judged by the others."""
    count = 3 * len(windows) // 4
    fit, judges = windows[:count], windows[count:]
    curvature = collect(model, fit, fit, folder / "curvature", device=CPU)
    narrow = method.width_multiple > 0
    channels = choose_channels(model, curvature, method, fit[:1], folder, device=CPU) if narrow else None
    store = factorize_model(model, curvature, folder / "factors", sides="two", device=CPU, channels=channels)
    plan = method.allocate(store, "fp32")
    into = Refitted(folder / "refit", store, {"layers": plan.to_dict()["layers"]})
    refitted = refit(model, plan, store, curvature, fit, judges, into, device=CPU)
    return Fit(model, curvature, store, plan, refitted, judges)


def share_of(factors: FactorStore | Refitted) -> float:
    """How much of a refit these factors are, by the name that the line search gave them."""
    return factors.identity.get("share", 1.0) if isinstance(factors, Refitted) else 0.0
