"""The stages of a job that concern bytes: planning under a byte budget, and rounding by what the curvature says."""

from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.curvature import Curvature
from rankwise.alloc.joint import StoredChoices, plan_within, require_bytes, smallest_plan
from rankwise.alloc.methods.base import Method
from rankwise.alloc.narrow import byte_budget
from rankwise.alloc.near import near_plans
from rankwise.alloc.precisions import RoundingTable, measure_rounding
from rankwise.alloc.rounder import Rounder
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.alloc.widths import choose_channels
from rankwise.anatomy import block_linears, linear_shapes, weight_of
from rankwise.budgets import ByteBudget, checkpoint_bytes
from rankwise.config import CompressConfig
from rankwise.engine.embeddings import coded_tensors
from rankwise.errors import RankwiseError
from rankwise.files import digest
from rankwise.plan import LayerSpec, RankPlan
from rankwise.work import Work
from rankwise.zoo import model_dtype, resolve_device

TRIES = 6  # plans until a checkpoint's size meets the budget: what is beside the layers depends on them a little


def byte_plans(work: Work, store: FactorStore, table: RoundingTable) -> dict[str, RankPlan]:
    """Plans under the job's byte budget: kind, rank and precision of every layer.

    One is the best of all choices; others are the best of fewer, as far as their predicted loss is near.

    Args:
        work: a job with a `budget`; its model is dense.
        store: factors of the model, or of what is left of it.
        table: what rounding these adds.

    Returns:
        At most `config.candidates`, by what they were chosen from, the least predicted loss first.

    Raises:
        RankwiseError: the budget is below the smallest plan.
    """
    config, dtype = work.config, model_dtype(work.model)

    def within(method: Method, choices: dict[str, StoredChoices]) -> RankPlan:
        return _within(config, method, store, choices, work.model)

    precisions = _budget(config).for_model(dtype)
    return near_plans(config.method, store, table, precisions, dtype, within, config.candidates)


def narrowed(work: Work, store: FactorStore, curvature: Curvature, table: RoundingTable) -> FactorStore | None:
    """Factors of what is left when MLPs have lost the channels that the job's bytes are better spent without.

    None where no MLP loses any. Arguments are those of `byte_plans`, and the model's curvature; the store has all
    channels.
    """
    config, model, folder, dtype = work.config, work.model, work.folder, model_dtype(work.model)
    precisions, target = _budget(config).for_model(dtype), linear_target(config, model)
    budget = byte_budget(config.method, store, table, precisions, target, dtype)
    window = work.windows["inputs"][:1]
    where: dict[str, Any] = {"device": resolve_device(config.device), "track": work.track}
    channels = choose_channels(model, curvature, config.method, window, folder, budget=budget, **where)
    if not channels.losses:
        return None
    place = folder / f"narrow-{digest(channels.identity, 8)}"
    return factorize_model(model, curvature, place, sides=str(config.method.sides), channels=channels, **where)


def rounding_table(work: Work, store: FactorStore, curvature: Curvature) -> RoundingTable:
    """What rounding the factors and weights of a store adds, in a folder of its own."""
    config, device = work.config, resolve_device(work.config.device)
    precisions = _budget(config).for_model(model_dtype(work.model))
    folder = work.folder / ("rounding" if store.channels is None else f"rounding-{store.folder.name}")
    given = work.model, curvature, store, precisions, config.method.kinds, folder
    return measure_rounding(*given, device=device, track=work.track)


def _within(
    config: CompressConfig, method: Method, store: FactorStore, choices: dict[str, StoredChoices], model: Any
) -> RankPlan:
    """The best plan under the job's budget; of `--size`, what is beside the layers depends on them a little."""
    budget, dtype = _budget(config), model_dtype(model)
    others, target = others_of(config, model), linear_target(config, model)
    if budget.size is None:
        return plan_within(method, store, choices, target)
    lowest = sum(int(entry.cost[0]) for entry in choices.values())
    best: RankPlan | None = None
    for _ in range(TRIES):
        target = max(target, lowest)
        plan = plan_within(method, store, choices, target)
        left = budget.size - checkpoint_bytes(plan, others, dtype)
        if left >= 0 and (best is None or plan.bytes > best.bytes):
            best = plan
        if 0 <= left <= method.tolerance * budget.size / 2 or (left < 0 and plan.bytes == lowest):
            break
        target = target + left if left >= 0 else min(target, plan.bytes) + left  # below a plan that is too large
    best = best or plan_within(method, store, choices, lowest)
    least = checkpoint_bytes(best, others, dtype)
    if least > budget.size:
        raise RankwiseError("size", f"{budget.size} bytes", f"allowed: from {least} bytes")
    return best


def require_budget(config: CompressConfig, model: Any) -> None:
    """Raise a RankwiseError if the byte budget is below the smallest plan: known before work begins."""
    shapes = linear_shapes(model)
    budget, dtype = _budget(config), model_dtype(model)
    precisions = budget.for_model(dtype)
    config.method.check_keep(shapes)
    if budget.size is not None:
        smallest = smallest_plan(config.method, shapes, precisions, dtype)
        least = checkpoint_bytes(smallest, others_of(config, model), dtype)
        if budget.size < least:
            parts = f"{least - smallest.bytes} for embeddings, norms and headers, {smallest.bytes} for linear layers"
            raise RankwiseError("size", f"{budget.size} bytes", f"allowed: from {least} bytes ({parts})")
        return
    try:
        require_bytes(config.method, shapes, precisions, linear_target(config, model), dtype)
    except RankwiseError as error:
        if error.field != "budget":
            raise
        raise RankwiseError("bits_per_weight", error.value, error.allowed) from None


def linear_target(config: CompressConfig, model: Any) -> int:
    """Bytes that are left for the linear layers, if all of them stay dense in the model's dtype; 0 where none are."""
    budget, shapes, dtype = _budget(config), linear_shapes(model), model_dtype(model)
    if budget.bits is not None:
        return int(budget.bits * sum(m * n for m, n in shapes.values()) / 8)
    assert budget.size is not None
    plain = RankPlan({name: LayerSpec("dense", m, n, min(m, n), dtype) for name, (m, n) in shapes.items()})
    return max(0, budget.size - (checkpoint_bytes(plain, others_of(config, model), dtype) - plain.bytes))


def others_of(config: CompressConfig, model: Any) -> dict[str, torch.Tensor]:
    """Everything that will be saved of a model but the weights of its linear layers; coded tables are empty ones."""
    known = {f"{name}.weight" for block in block_linears(model) for name in block}
    found = {name: tensor for name, tensor in model.state_dict().items() if name not in known}
    return coded_tensors(model, found, config.embeddings) if config.embeddings else found


def make_rounding(
    config: CompressConfig,
    model: Any,
    curvature: Curvature,
    folder: Path,
    store: FactorStore | None = None,
    *,
    fitted: bool,
    held_out: Curvature | None = None,
) -> Rounder:
    """The rounding of a job.

    Args:
        config: its device.
        model: dense, or with layers whose factors are to be rounded.
        curvature: of the dense model.
        folder: of finished layers.
        store: the factors, which know the channels that layers have lost; None: none.
        fitted: factors were refitted or healed: they are to be repeated, not the dense weight.
        held_out: of other text, which judges; None: the guards go by `curvature`.
    """
    blocks = [list(block) for block in block_linears(model)]

    def dense(name: str) -> torch.Tensor:
        weight = weight_of(model.get_submodule(name))
        return weight if store is None else store.weight(name, weight)

    channels = None if store is None else store.channels
    return Rounder(
        curvature, blocks, folder, None if fitted else dense, resolve_device(config.device), held_out, channels
    )


def _budget(config: CompressConfig) -> ByteBudget:
    assert config.budget is not None
    return config.budget
