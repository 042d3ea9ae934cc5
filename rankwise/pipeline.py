"""The pipeline: curvature → factors → plan → modules → checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.alloc.calibration import Calibration
from rankwise.alloc.methods.base import Method
from rankwise.alloc.pivots import pivot_form
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore
from rankwise.anatomy import block_linears, features, weight_of
from rankwise.engine.doors.hf import attach
from rankwise.engine.embeddings import code_embeddings, find_ends
from rankwise.engine.layers import CompressedLinear, build_layer
from rankwise.errors import RankwiseError
from rankwise.factoring import factors_name, measure_factors
from rankwise.plan import LayerSpec, RankPlan
from rankwise.progress import Track, silent
from rankwise.provenance import versions
from rankwise.quantize import Rounding, nearest
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
        gradient_text: `[M, T]` token ids for the output-gradient moments; the first quarter of `text` by default.
        work: folder for curvature and factors, reusable and resumable; a temporary one by default.
        device: where blocks compute.
        seed: fixes the sampled labels.
        track: progress, e.g. `rankwise.progress.on_terminal`.

    Returns:
        A plan that carries a handle on its factors, ready for `compress`.
    """
    if not len(text):
        raise RankwiseError("text", "0 windows", "at least 1")
    if not method.two_sided:
        gradient_text = None
    elif gradient_text is None:
        gradient_text = text[: max(1, len(text) // 4)]
    temporary = tempfile.TemporaryDirectory(prefix="rankwise-") if work is None else None
    folder = Path(temporary.name if temporary else str(work))
    places = folder / f"curvature-{method.sides}", folder / factors_name(method)
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
    model: Any,
    plan: RankPlan,
    factors: FactorStore | Refitted | None = None,
    *,
    rounding: Rounding = nearest,
    device: str | torch.device = "cpu",
    track: Track = silent,
) -> Any:
    """Put a plan into effect: the named linear layers are replaced, in place.

    Args:
        model: the model that the plan was made for; it is changed and returned.
        plan: from `allocate`, or read from JSON.
        factors: needed for a plan read from JSON, unless every layer stays dense; a fresh plan carries its own.
        rounding: makes codes of 4 or 8 bits of the factors (and of dense weights) where the plan says so.
        device: where the rows of pivot layers are found; a GPU is much faster at it.
        track: progress.

    Raises:
        RankwiseError: a module is unknown or its shape differs, or factors are missing.
    """
    store = factors or plan.factors
    if store is None and any(spec.kind != "dense" or spec.dense_shape for _, spec in plan):
        raise RankwiseError("factors", None, "a plan read from JSON needs the factors of its model")
    linears = {name: module for block in block_linears(model) for name, module in block.items()}
    check_plan(plan, {name: features(linear) for name, linear in linears.items()})
    if store is not None:
        check_factors(plan, store)
    if plan.embeddings:
        _code_tables(model, plan)
    with track("layers", len(plan.compressed)) as advance:
        for name, spec in plan.compressed.items():
            old = linears.pop(name)  # its memory is free once the new layer is in place
            rows = None if store is None else store.rows(name)
            _replace(model, name, spec, _parts(name, spec, store, old, device), old, rounding, rows)
            del old
            advance()
    if isinstance(store, Refitted):
        for name, module in linears.items():
            own = weight_of(module)
            if (weight := store.weight(name, own)) is not own:
                own.copy_(weight)
                _require_finite(f"{name}.weight", own)
    attach(model, plan.compressed, plan.embeddings)
    return model


def _code_tables(model: Any, plan: RankPlan) -> None:
    if plan.embeddings.keys() != find_ends(model).keys():
        raise RankwiseError("embeddings", ", ".join(plan.embeddings), "allowed: this model's table and head")
    code_embeddings(model, next(iter(plan.embeddings.values())))


@torch.no_grad()
def round_layers(model: Any, plan: RankPlan, rounding: Rounding = nearest, *, track: Track = silent) -> None:
    """Round layers in place that `compress` made of the same plan in 16 or 32 bits: for what must come before rounding.

    Args:
        model: made by `compress`.
        plan: some of its layers are to be stored in 4 or 8 bits.
        rounding: as in `compress`.
        track: progress.
    """
    rounded = {name: spec for name, spec in plan.compressed.items() if spec.quantised}
    with track("rounding", len(rounded)) as advance:
        for name, spec in rounded.items():
            old = model.get_submodule(name)
            parts = {part: weight_of(old) if spec.kind == "dense" else getattr(old, part) for part in spec.matrices}
            parts |= {"pivot_index": old.pivot_index} if spec.kind == "pivot" else {}
            _replace(model, name, spec, parts, old, rounding)
            advance()
    attach(model, plan.compressed, plan.embeddings)


def check_factors(plan: RankPlan, store: FactorStore | Refitted) -> None:
    """Raise a RankwiseError unless the factors have lost the channels that the plan says."""
    for name, spec in plan:
        if store.shapes.get(name) != (spec.out_features, spec.in_features):
            planned = f"{name}: [out, in] = {[spec.out_features, spec.in_features]}"
            allowed = f"the factors have {store.shapes.get(name)}: layers of one MLP lose the same channels"
            raise RankwiseError("plan", planned, allowed)


def check_plan(plan: RankPlan, shapes: dict[str, tuple[int, int]]) -> None:
    """Raise a RankwiseError unless the plan names every linear layer of the model, and no other, in its dense shape."""
    for name, spec in plan:
        if name not in shapes:
            raise RankwiseError("plan", f"{name}: no such module", f"the model has, e.g., {next(iter(shapes))}")
        if shapes[name] != spec.original_shape:
            found = f"{name}: [out, in] = {list(spec.original_shape)}"
            raise RankwiseError("plan", found, f"the model has {list(shapes[name])}")
    for name in shapes:
        if name not in plan.layers:
            raise RankwiseError("plan", f"{name} is not in it", "a plan lists every linear layer of the blocks")


def tensor_bytes(model: Any) -> int:
    """Bytes of a model's parameters and saved buffers; tied tensors count once."""
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())


def _parts(
    name: str, spec: LayerSpec, store: FactorStore | Refitted | None, old: Any, device: str | torch.device
) -> dict[str, torch.Tensor]:
    """A layer's matrices by name, and its index if it has one, not rounded yet, in host memory."""
    if spec.kind == "dense" or store is None:
        return {"weight": weight_of(old) if store is None else store.weight(name, weight_of(old))}
    u, v = store.load(name, spec.rank, spec.indices)
    if spec.kind == "pivot":
        found = [tensor.cpu() for tensor in pivot_form(u.to(device), v.to(device))]
        return dict(zip(("pivot_index", "pivot_basis", "pivot_coeff"), found, strict=True))
    return {"lowrank_u": u, "lowrank_v": v}


def _replace(
    model: Any,
    name: str,
    spec: LayerSpec,
    parts: dict[str, torch.Tensor],
    old: Any,
    rounding: Rounding,
    rows: torch.Tensor | None = None,
) -> None:
    """Put a new layer in the place of an old one, of whose outputs it has `rows`."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    layer = build_layer(spec, old.bias is not None, dtype, old.weight.device)
    if spec.quantised:
        parts = {part: tensor for part, tensor in parts.items() if part == "pivot_index"} | rounding(name, parts, spec)
    _fill(layer, parts)
    if old.bias is not None and layer.bias is not None:
        layer.bias.copy_(old.bias if rows is None else old.bias[rows])
    model.set_submodule(name, layer)


def _fill(layer: CompressedLinear | nn.Linear, values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        getattr(layer, name).copy_(value)
        _require_finite(name, getattr(layer, name))


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise RankwiseError(name, "NaN or Inf after rounding", "try --dtype bf16 or fp32")
