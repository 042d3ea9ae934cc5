"""Room for a job: on the disk, estimated before hours are spent, and on a device."""

from typing import Any

import torch

from rankwise.alloc.partway import BETWEEN
from rankwise.alloc.teacher import KEPT
from rankwise.anatomy import block_linears, weight_of
from rankwise.config import CompressConfig
from rankwise.files import require_room
from rankwise.jobs import work_folder
from rankwise.pipeline import tensor_bytes
from rankwise.plan import RankPlan
from rankwise.weights import needs_curvature, needs_factors


def roomy(device: torch.device, model: Any, copies: int = 1) -> torch.device:
    """The device, or the CPU where the whole model, or so many copies of it, would not fit on it."""
    if device.type == "cuda" and (copies + 0.25) * tensor_bytes(model) > torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def require_room_for(
    config: CompressConfig, given: RankPlan | None, model: Any, windows: dict[str, torch.Tensor]
) -> None:
    """Work folder and result, estimated from above before hours are spent; what an earlier run left counts."""
    if config.out.exists():
        return
    blocks = [[weight_of(m) for m in block.values()] for block in block_linears(model)]
    weights = [w for block in blocks for w in block]
    outputs = config.method.two_sided or config.refits
    moments = sum(4 * (w.shape[1] ** 2 + (w.shape[0] ** 2 + w.shape[1] ** 2 if outputs else 0)) for w in weights)
    factors = sum(4 * min(w.shape) * (w.shape[0] + w.shape[1]) for w in weights)
    measures, factored = needs_curvature(config, given) and not config.scores, needs_factors(config, given)
    needed = tensor_bytes(model) + (moments if measures else 0) + (factors if measures and factored else 0)
    needed += (1 + len(BETWEEN)) * factors if factored and config.refits else 0
    narrow = config.narrows or any(spec.dense_shape for _, spec in given or ())
    if factored and narrow:  # what a layer becomes that reads fewer channels; for bytes, factors of these, too
        needed += sum(4 * max(w.numel() for w in block) for block in blocks) + (factors if config.budget else 0)
    rounds = config.feeds_back and (config.budget or (given.quantised if given else config.precision))
    needed += moments if measures and rounds else 0  # held-out ones
    needed += tensor_bytes(model) // 2 if measures else 0  # rounded layers, at most
    if config.heal:  # values, best values and two moments of Adam; the last save stays until the next is complete
        heard = windows["learn"].numel() + windows["judges"].numel()
        needed += 2 * 4 * 4 * sum(w.numel() for w in weights) + 8 * KEPT * heard
    folders = [work_folder(config.out), *([config.curvature] if config.curvature else [])]
    there = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    require_room(config.out.absolute().parent, max(0, needed - there))
