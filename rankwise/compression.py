"""`rankwise compress`: from a model's name to a checkpoint, or to a folder of scores, resumable at every stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import Curvature
from rankwise.alloc.heal import HealConfig, heal
from rankwise.alloc.refit import refit
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore
from rankwise.alloc.teacher import Teacher
from rankwise.anatomy import block_linears, features, require_context, weight_of
from rankwise.config import CompressConfig
from rankwise.engine.checkpoint import PLAN, save
from rankwise.evaluate import perplexity
from rankwise.files import disk_guard, publish, require_room
from rankwise.jobs import Job, work_folder
from rankwise.pipeline import check_plan, compress, measure_factors, tensor_bytes
from rankwise.plan import RankPlan
from rankwise.progress import Track, silent
from rankwise.provenance import identify_job, provenance
from rankwise.scores import FACTORS, INDEX, finish_scores, open_scores, require_scores
from rankwise.text import read_text, take_windows, token_windows
from rankwise.zoo import load_model, model_dtype, resolve_device

LEARN_WINDOWS = 256  # of a text that is given to learn from, unless the user says how many
JUDGES = 8  # windows, of those for the output gradients, that judge a refit and a healing


@dataclass
class Work:
    """One job's parts, handed from stage to stage.

    Args:
        config: the command.
        model: dense at first.
        tokenizer: of the model.
        windows: `inputs`, `gradients`, `measure`, `learn`, each `[N, T]` token ids; empty where no text is needed.
        folder: unfinished work lies here.
        track: progress.
    """

    config: CompressConfig
    model: Any
    tokenizer: Any
    windows: dict[str, torch.Tensor]
    folder: Path
    track: Track


def compress_to_folder(config: CompressConfig, *, track: Track = silent) -> RankPlan:
    """From a model's name to a folder. Killed anywhere, the same call continues.

    Returns:
        The plan, as written into the checkpoint (with `score_only`: the plan of the method's own ratio).

    Raises:
        RankwiseError: bad input, or a full disk; nothing is left under `config.out`.
    """
    given = RankPlan.load(config.plan) if config.plan else None
    if config.scores:
        require_scores(config.scores)
    resolve_device(config.device)
    raw = {key: read_text(source) for key, source in _sources(config).items()}
    model, tokenizer = load_model(config.model, config.dtype)
    windows = _prepare(config, given, raw, model, tokenizer)
    identity = identify_job(config, model_dtype(model))
    with Job.open(config.out, identity, restart=config.restart) as job, disk_guard(config.out):
        work = Work(config, model, tokenizer, windows, job.folder, track)
        plan = _score(work) if config.score_only else _compress(work, given)
        job.finish()
    return plan


def _sources(config: CompressConfig) -> dict[str, str]:
    """Which texts are needed."""
    text = config.text
    needed = {} if config.scores and not config.heal else {"calibration": text.text}
    return needed | ({"learn": text.learn} if config.learns and text.learn else {})


def _prepare(
    config: CompressConfig, given: RankPlan | None, raw: dict[str, str], model: Any, tokenizer: Any
) -> dict[str, torch.Tensor]:
    """Everything that can be wrong is found before work begins; returns the windows."""
    shapes = {name: features(m) for block in block_linears(model) for name, m in block.items()}
    if given is not None:
        check_plan(given, shapes)
    elif config.scores is None:
        config.method.check_budget(shapes)
    text = config.text
    empty = torch.empty(0, text.seq_len, dtype=torch.int64)
    windows = dict.fromkeys(("inputs", "gradients", "measure", "learn"), empty)
    if "calibration" in raw:
        require_context(model, text.seq_len)
        sizes = [text.samples, text.gradient_samples, text.measure]
        found = token_windows(raw["calibration"], tokenizer, text.seq_len)
        taken = take_windows(found, sum(sizes), text.text, shuffle=text.shuffle, seed=text.seed)
        windows |= zip(("inputs", "gradients", "measure"), taken.split(sizes), strict=True)
        windows["learn"] = windows["inputs"]
    if "learn" in raw:
        found = token_windows(raw["learn"], tokenizer, text.seq_len)
        count = text.learn_samples or min(LEARN_WINDOWS, max(1, len(found)))
        windows["learn"] = take_windows(found, count, str(text.learn))
    _require_room(config, model)
    return windows


def _compress(work: Work, given: RankPlan | None) -> RankPlan:
    config, model = work.config, work.model
    if config.out.exists():  # the last run was killed between the rename and the cleaning up
        return RankPlan.load(config.out / PLAN)
    weights = model_dtype(model)
    if config.scores:
        scores = open_scores(config.scores, model)
        plan, store, identity = scores.allocate(config.method.ratio, weights), scores.store, scores.facts["curvature"]
    else:
        store, curvature = _factors(work, work.folder / FACTORS)
        plan = _plan(work, given, store, curvature)[0]
        identity = curvature.identity
    plan.provenance = provenance(config, identity, weights)
    if config.scores:
        plan.provenance["options"] = scores.facts["options"] | {"ratio": config.method.ratio}
    found: Any = _refit(work, plan, store, curvature) if config.refits else store
    before = _perplexity(work)
    if config.heal:
        work.model.to(_roomy(resolve_device(config.device), model))
        teacher = Teacher(work.folder / "teacher")
        teacher.listen(model, _healing_windows(work), track=work.track)
        model.to("cpu")
    compress(model, plan, found, track=work.track)
    if config.heal:
        _heal(work, plan, teacher)
    after = _perplexity(work)
    if before is not None:
        plan.provenance["measured"] = {"windows": len(work.windows["measure"]), "dense": before, "compressed": after}
    plan.other_bytes = tensor_bytes(model) - plan.bytes
    save(model, work.tokenizer, plan, config.out, staging=work.folder / "checkpoint")
    return plan


def _score(work: Work) -> RankPlan:
    """Factors, spectra and what the method learns, into the folder that the user asked for."""
    config, staged = work.config, work.folder / "scores"
    weights = model_dtype(work.model)
    if config.out.exists():
        return open_scores(config.out, work.model).allocate(config.method.ratio, weights)
    store, curvature = _factors(work, staged / FACTORS)
    plan, learnt = _plan(work, None, store, curvature)
    if not (staged / INDEX).exists():
        facts = provenance(config, curvature.identity, weights)
        finish_scores(staged, facts, learnt)
    publish(staged, config.out)
    return plan


def _factors(work: Work, folder: Path) -> tuple[FactorStore, Curvature]:
    config = work.config
    moments = config.curvature or work.folder / "curvature"
    inputs, gradients = work.windows["inputs"], work.windows["gradients"]
    both = config.method.two_sided or config.refits
    return measure_factors(
        work.model,
        inputs,
        gradients if both else None,
        config.method,
        moments,
        folder,
        config.device,
        config.text.seed,
        work.track,
    )


def _plan(work: Work, given: RankPlan | None, store: FactorStore, curvature: Curvature) -> tuple[RankPlan, Any]:
    """The plan, and every layer's choices with learnt losses if the method learns."""
    config, weights = work.config, model_dtype(work.model)
    if given is not None:
        return config.method.restate(given, store, weights), None
    if not config.method.learns:
        return config.method.allocate(store, weights), None
    device, folder = resolve_device(config.device), work.folder / "learning"
    learn, seed = work.windows["learn"], config.text.seed
    calibration = Calibration(work.model, store, curvature, learn, folder, device, seed, work.track)
    plan = config.method.allocate(store, weights, calibration)
    work.model.to("cpu")
    return plan, calibration.learnt


def _refit(work: Work, plan: RankPlan, store: FactorStore, curvature: Curvature) -> Refitted:
    layers = plan.to_dict()["layers"]
    into = Refitted(work.folder / "refit", store, {"layers": layers, "curvature": curvature.identity})
    device = resolve_device(work.config.device)
    learn, judges = work.windows["learn"], work.windows["gradients"][:JUDGES]
    found = refit(work.model, plan, store, curvature, learn, judges, into, device=device, track=work.track)
    kept = sum(share is not None for share, _ in found.outcomes().values())
    plan.provenance["refit"] = {"layers": kept, "gain": sum(gain for _, gain in found.outcomes().values())}
    return found


def _healing_windows(work: Work) -> torch.Tensor:
    """What is distilled on, and behind it the windows that judge."""
    return torch.cat([work.windows["learn"], work.windows["gradients"][:JUDGES]])


def _heal(work: Work, plan: RankPlan, teacher: Teacher) -> None:
    config, windows = work.config, _healing_windows(work)
    work.model.to(_roomy(resolve_device(config.device), work.model))
    options = HealConfig(steps=config.heal, seed=config.text.seed)
    identity = {"plan": plan.to_dict(), "options": options.__dict__}
    judges = min(JUDGES, len(work.windows["gradients"]))
    names, folder = list(plan.compressed), work.folder
    healed = heal(work.model, names, teacher, windows, judges, options, folder, identity, track=work.track)
    work.model.to("cpu")
    plan.provenance["heal"] = {"steps": config.heal, "before": healed.before, "after": healed.best}


def _perplexity(work: Work) -> float | None:
    windows, model = work.windows["measure"], work.model
    if not len(windows):
        return None
    value = perplexity(model.to(_roomy(resolve_device(work.config.device), model)), windows, track=work.track)
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
    copies = 1 + int(config.refits) + 2 * int(config.heal > 0)
    folders = [work_folder(config.out), *([config.curvature] if config.curvature else [])]
    there = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    needed = tensor_bytes(model) + copies * factors + moments
    require_room(config.out.absolute().parent, max(0, needed - there))
