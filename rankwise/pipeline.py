"""The pipeline: curvature → factors → plan → modules → checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.curvature import Curvature, collect
from rankwise.alloc.factors import pivot_form
from rankwise.alloc.methods.base import Method
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.anatomy import block_linears, features, require_context, weight_of
from rankwise.config import CompressConfig
from rankwise.engine.checkpoint import PLAN, save
from rankwise.engine.doors.hf import attach
from rankwise.engine.layers import CompressedLinear, build_layer
from rankwise.errors import RankwiseError
from rankwise.evaluate import perplexity
from rankwise.files import disk_guard, require_room
from rankwise.jobs import Job, work_folder
from rankwise.plan import RankPlan
from rankwise.progress import Track, silent
from rankwise.provenance import identify_job, provenance, versions
from rankwise.text import read_text, take_windows, token_windows
from rankwise.zoo import load_model, model_dtype, resolve_device


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
    if method.two_sided and gradient_text is None:
        split = len(text) - max(1, len(text) // 4)
        if split < 1:
            raise RankwiseError("text", f"{len(text)} windows", "two-sided factors need at least 2")
        text, gradient_text = text[:split], text[split:]
    temporary = tempfile.TemporaryDirectory(prefix="rankwise-") if work is None else None
    folder = Path(temporary.name if temporary else str(work))
    places = folder / f"curvature-{method.sides}", folder / f"factors-{method.sides}"
    factors, curvature = _measure_factors(model, text, gradient_text, method, *places, device, seed, track)
    plan = method.allocate(factors, model_dtype(model))
    factors.keep_alive = temporary
    plan.factors = factors
    plan.provenance = {"options": method.options(), "curvature": curvature.identity, "versions": versions()}
    return plan


@torch.no_grad()
def compress(model: Any, plan: RankPlan, factors: FactorStore | None = None, *, track: Track = silent) -> Any:
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
            _fill(layer, spec.kind, store.load(name, spec.rank), old)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
            del old
            advance()
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


def compress_to_folder(config: CompressConfig, *, track: Track = silent) -> RankPlan:
    """`rankwise compress`: from a model's name to a checkpoint folder. Killed anywhere, the same call continues.

    Returns:
        The plan, as written into the checkpoint.

    Raises:
        RankwiseError: bad input, or a full disk; nothing is left under `config.out`.
    """
    given = RankPlan.load(config.plan) if config.plan else None
    resolve_device(config.device)
    raw = read_text(config.text.text)
    model, tokenizer = load_model(config.model, config.dtype)
    windows = _prepare(config, given, raw, model, tokenizer)
    identity = identify_job(config, model_dtype(model))
    with Job.open(config.out, identity, restart=config.restart) as job, disk_guard(config.out):
        if config.out.exists():  # the last run was killed between the rename and the cleaning up
            plan = RankPlan.load(config.out / PLAN)
        else:
            plan = _work(config, given, model, tokenizer, windows, job.folder, track)
        job.finish()
    return plan


def _prepare(
    config: CompressConfig, given: RankPlan | None, raw: str, model: Any, tokenizer: Any
) -> dict[str, torch.Tensor]:
    """Everything that can be wrong is found before work begins; returns the windows."""
    shapes = {name: features(m) for block in block_linears(model) for name, m in block.items()}
    if given is None:
        config.method.check_budget(shapes)
    else:
        check_plan(given, shapes)
    require_context(model, config.text.seq_len)
    text = config.text
    windows = token_windows(raw, tokenizer, text.seq_len)
    sizes = [text.samples, text.gradient_samples, text.measure]
    taken = take_windows(windows, sum(sizes), text.text, shuffle=text.shuffle, seed=text.seed)
    _require_room(config, model)
    return dict(zip(("inputs", "gradients", "measure"), taken.split(sizes), strict=True))


def _work(
    config: CompressConfig,
    given: RankPlan | None,
    model: Any,
    tokenizer: Any,
    windows: dict[str, torch.Tensor],
    work: Path,
    track: Track,
) -> RankPlan:
    weights = model_dtype(model)
    inputs, gradients = windows["inputs"], windows["gradients"]
    places = config.curvature or work / "curvature", work / "factors"
    store, curvature = _measure_factors(
        model, inputs, gradients, config.method, *places, config.device, config.text.seed, track
    )
    plan = config.method.allocate(store, weights) if given is None else config.method.restate(given, store, weights)
    plan.provenance = provenance(config, curvature.identity, weights)
    held_out = windows["measure"]
    before = _perplexity(model, held_out, config.device, track)
    compress(model, plan, store, track=track)
    after = _perplexity(model, held_out, config.device, track)
    if before is not None:
        plan.provenance["measured"] = {"windows": len(held_out), "dense": before, "compressed": after}
    plan.other_bytes = tensor_bytes(model) - plan.bytes
    save(model, tokenizer, plan, config.out, staging=work / "checkpoint")
    return plan


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
        if not torch.isfinite(getattr(layer, name)).all():
            raise RankwiseError(name, "NaN or Inf after rounding", "try --dtype bf16 or fp32")
    if old.bias is not None and layer.bias is not None:
        layer.bias.copy_(old.bias)


def _measure_factors(
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
    """Curvature into the folder `moments`, then factors into `factors`; gradients only where the method asks."""
    target, two_sided = resolve_device(device), method.two_sided
    wanted = gradients if two_sided else None
    curvature = collect(model, inputs, wanted, moments, device=target, seed=seed, track=track)
    return factorize_model(model, curvature, factors, two_sided=two_sided, device=target, track=track), curvature


def _perplexity(model: Any, windows: torch.Tensor, device: str, track: Track) -> float | None:
    if not len(windows):
        return None
    value = perplexity(model.to(_roomy(resolve_device(device), model)), windows, track=track)
    model.to("cpu")
    return value


def _roomy(device: torch.device, model: Any) -> torch.device:
    """The device, or the CPU where the whole model would not fit on it."""
    if device.type == "cuda" and 1.25 * tensor_bytes(model) > torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def _require_room(config: CompressConfig, model: Any) -> None:
    """Work folder and checkpoint, estimated from above before hours are spent; what an earlier run left counts."""
    if config.out.exists():
        return
    weights = [weight_of(m) for block in block_linears(model) for m in block.values()]
    moments = sum(4 * (w.shape[1] ** 2 + (w.shape[0] ** 2 if config.method.two_sided else 0)) for w in weights)
    factors = sum(4 * min(w.shape) * (w.shape[0] + w.shape[1]) for w in weights)
    folders = [work_folder(config.out), *([config.curvature] if config.curvature else [])]
    there = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    require_room(config.out.absolute().parent, max(0, tensor_bytes(model) + factors + moments - there))
