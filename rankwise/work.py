"""One job's parts, and the stages of it that several processes share: curvature, factors, masks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import Curvature, collect
from rankwise.alloc.store import FactorStore
from rankwise.config import CompressConfig
from rankwise.distributed import from_main, is_main, world
from rankwise.factoring import measure_factors
from rankwise.plan import RankPlan
from rankwise.progress import Track
from rankwise.scores import FACTORS
from rankwise.weights import needs_factors
from rankwise.zoo import model_dtype, resolve_device


@dataclass
class Work:
    """One job's parts, handed from stage to stage.

    Args:
        config: the command.
        model: dense at first.
        tokenizer: of the model.
        windows: from `windows.cut_windows`.
        folder: unfinished work lies here.
        track: progress.
    """

    config: CompressConfig
    model: Any
    tokenizer: Any
    windows: dict[str, torch.Tensor]
    folder: Path
    track: Track


def measure_curvature(work: Work) -> Curvature:
    """Second moments alone, for rounding."""
    config, windows = work.config, work.windows
    folder, device = config.curvature or work.folder / "curvature", resolve_device(config.device)
    gradients = windows["gradients"] if config.method.two_sided else None
    return collect(
        work.model, windows["inputs"], gradients, folder, device=device, seed=config.text.seed, track=work.track
    )


def measure_held_out(work: Work, curvature: Curvature) -> Curvature | None:
    """The same as `curvature`, of the windows that judge; None if there are none."""
    config, judges = work.config, work.windows["judges"]
    if not len(judges):
        return None
    folder, device = work.folder / "held_out", resolve_device(config.device)
    gradients = judges if curvature.has_outputs else None
    return collect(work.model, judges, gradients, folder, device=device, seed=config.text.seed, track=work.track)


def measure(work: Work, folder: Path, given: RankPlan | None = None) -> tuple[FactorStore, Curvature]:
    """Curvature and factors; output gradients also where only the refit asks for them.

    Channels are taken out where a plan that is to be carried out says so, or under a budget of parameters; one of bytes
    asks what rounding costs before (`rounded.narrowed`).
    """
    config = work.config
    planned = {n: s.in_features for n, s in given or () if s.in_features < s.original_shape[1]}
    free = config.narrows and config.budget is None
    moments = config.curvature or work.folder / "curvature"
    gradients = work.windows["gradients"] if config.method.two_sided or config.refits else None
    where = moments, folder, config.device, config.text.seed, work.track
    return measure_factors(
        work.model, work.windows["inputs"], gradients, config.method, *where, planned=None if free else planned
    )


def learn_plan(work: Work, store: FactorStore, curvature: Curvature) -> tuple[RankPlan, Calibration]:
    """The plan of a method that learns; `learnt` of the calibration is what `again` makes other plans from."""
    config, folder, text = work.config, work.folder / "learning", work.windows["learn"]
    where = folder, resolve_device(config.device), config.text.seed, work.track
    calibration = Calibration(work.model, store, curvature, text, *where)
    plan = config.method.allocate(store, model_dtype(work.model), calibration)
    work.model.to("cpu")
    return plan, calibration


def share(work: Work, given: RankPlan | None) -> None:
    """What several processes do together, onto the disk, where the main one then finds it; nothing for a single one.

    Args:
        work: the job; all but the main process let go of its model.
        given: the plan that it is to carry out, or None.
    """
    if world() == 1:
        return
    config = work.config
    if not from_main(config.out.exists) and not config.scores:  # else nothing is left to measure
        if config.score_only or needs_factors(config, given):
            folder = work.folder / "scores" if config.score_only else work.folder
            measured = measure(work, folder / FACTORS, given)
            if given is None and config.method.shared:
                learn_plan(work, *measured)
        elif config.feeds_back:
            measure_curvature(work)
    if not is_main():
        work.model = None
