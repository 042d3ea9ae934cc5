"""The pipeline: curvature → factors → plan → modules → checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import Curvature, collect
from rankwise.alloc.factors import pivot_form
from rankwise.alloc.methods.base import Method
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.anatomy import block_linears, weight_of
from rankwise.engine.doors.hf import attach
from rankwise.engine.layers import CompressedLinear, build_layer
from rankwise.errors import RankwiseError
from rankwise.plan import RankPlan
from rankwise.progress import Track, silent
from rankwise.provenance import versions
from rankwise.zoo import model_dtype, resolve_device


def allocate(
    model: Any,
    text: torch.Tensor,
    method: Method,
    *,
    gradient_text: torch.Tensor | None = None,
    work: str | Path | None = None,
    device: str = "auto",
    seed: int = 0,
    track: Track = silent,
) -> RankPlan:
    """Measure a model's curvature on a text and choose a kind and a rank for every linear layer.

    Args:
        model: causal language model in host memory, eval mode.
        text: `[N, T]` token ids that calibrate the input moments, see `rankwise.text.token_windows`.
        method: `Global(ratio=0.8)` or `Uniform(...)`.
        gradient_text: `[M, T]` token ids for the output-gradient moments; the last quarter of `text` by default.
        work: folder for curvature and factors, reusable and resumable; a temporary one by default.
        device: where blocks compute.
        seed: fixes the sampled labels.
        track: progress, e.g. `rankwise.progress.on_terminal`.

    Returns:
        A plan that carries a handle on its factors, ready for `compress`.
    """
    if not method.two_sided:
        gradient_text = None
    elif gradient_text is None:
        split = len(text) - max(1, len(text) // 4)
        if split < 1:
            raise RankwiseError("text", f"{len(text)} windows", "two-sided factors need at least 2")
        text, gradient_text = text[:split], text[split:]
    temporary = tempfile.TemporaryDirectory(prefix="rankwise-") if work is None else None
    folder = Path(temporary.name if temporary else str(work))
    places = folder / f"curvature-{method.sides}", folder / f"factors-{method.sides}"
    factors, curvature = measure_factors(model, text, gradient_text, method, *places, device, seed, track)
    calibration = None
    if method.learns:
        target = resolve_device(device)
        calibration = Calibration(model, factors, curvature, text, folder / "learning", target, seed, track)
    plan = method.allocate(factors, model_dtype(model), calibration)
    factors.keep_alive = temporary
    plan.factors = factors
    plan.provenance = {"options": method.options(), "curvature": curvature.identity, "versions": versions()}
    return plan


@torch.no_grad()
def compress(
    model: Any, plan: RankPlan, factors: FactorStore | Refitted | None = None, *, track: Track = silent
) -> Any:
    """Put a plan into effect: the named linear layers are replaced, in place.

    Args:
        model: the model that the plan was made for; it is changed and returned.
        plan: from `allocate`, or read from JSON.
        factors: needed for a plan that was read from JSON; a fresh plan carries its own.

    Raises:
        RankwiseError: a module is unknown or its shape differs, or factors are missing.
    """
    store = factors or plan.factors
    if store is None:
        raise RankwiseError("factors", None, "a plan read from JSON needs the factors of its model")
    linears = {name: module for block in block_linears(model) for name, module in block.items()}
    check_plan(plan, store.shapes)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with track("layers", len(plan.compressed)) as advance:
        for name, spec in plan.compressed.items():
            old = linears.pop(name)  # its memory is free once the new layer is in place
            layer = build_layer(spec, old.bias is not None, dtype, weight_of(old).device)
            _fill(layer, spec.kind, store.load(name, spec.rank, spec.indices), old)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
            del old
            advance()
    if isinstance(store, Refitted):
        for name, module in linears.items():
            if (weight := store.weight(name)) is not None:
                weight_of(module).copy_(weight)
                _require_finite(f"{name}.weight", weight_of(module))
    attach(model, plan.compressed)
    return model


def check_plan(plan: RankPlan, shapes: dict[str, tuple[int, int]]) -> None:
    """Raise a RankwiseError unless the plan names every linear layer of the model, and no other, in its shape."""
    for name, spec in plan:
        if name not in shapes:
            raise RankwiseError("plan", f"{name}: no such module", f"the model has, e.g., {next(iter(shapes))}")
        if shapes[name] != (spec.out_features, spec.in_features):
            found = f"{name}: [out, in] = {[spec.out_features, spec.in_features]}"
            raise RankwiseError("plan", found, f"the model has {list(shapes[name])}")
    for name in shapes:
        if name not in plan.layers:
            raise RankwiseError("plan", f"{name} is not in it", "a plan lists every linear layer of the blocks")


def tensor_bytes(model: Any) -> int:
    """Bytes of a model's parameters and saved buffers; tied tensors count once."""
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())


def _fill(layer: CompressedLinear, kind: str, factors: tuple[torch.Tensor, torch.Tensor], old: Any) -> None:
    u, v = factors
    if kind == "pivot":
        values = dict(zip(("pivot_index", "pivot_basis", "pivot_coeff"), pivot_form(u, v), strict=True))
    else:
        values = {"lowrank_u": u, "lowrank_v": v}
    for name, value in values.items():
        getattr(layer, name).copy_(value)
        _require_finite(name, getattr(layer, name))
    if old.bias is not None and layer.bias is not None:
        layer.bias.copy_(old.bias)


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise RankwiseError(name, "NaN or Inf after rounding", "try --dtype bf16 or fp32")


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
) -> tuple[FactorStore, Curvature]:
    """Curvature into the folder `moments`, then factors into `factors`; `gradients` None: no output gradients."""
    target = resolve_device(device)
    curvature = collect(model, inputs, gradients, moments, device=target, seed=seed, track=track)
    return factorize_model(model, curvature, factors, sides=str(method.sides), device=target, track=track), curvature
