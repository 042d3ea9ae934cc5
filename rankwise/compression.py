"""`rankwise compress`: from a model's name to a checkpoint, or to a folder of scores, resumable at every stage."""

from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.curvature import Curvature, hash_windows
from rankwise.alloc.heal import HealConfig, heal
from rankwise.alloc.near import nearest_of
from rankwise.alloc.refit import refit
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore
from rankwise.alloc.teacher import Teacher
from rankwise.anatomy import linear_shapes
from rankwise.candidates import Candidate, choose
from rankwise.config import CompressConfig
from rankwise.distributed import from_main, is_main
from rankwise.engine.checkpoint import PLAN, save
from rankwise.engine.embeddings import find_ends
from rankwise.errors import RankwiseError
from rankwise.evaluate import perplexity
from rankwise.files import disk_guard, publish
from rankwise.jobs import Job
from rankwise.linesearch import search_share
from rankwise.pipeline import check_factors, check_plan, compress, round_layers, tensor_bytes
from rankwise.plan import RankPlan
from rankwise.progress import Track, silent
from rankwise.provenance import identify_job, provenance
from rankwise.quantize import Rounding, nearest
from rankwise.room import require_room_for, roomy
from rankwise.rounded import byte_plans, make_rounding, narrowed, require_budget, rounding_table
from rankwise.scores import FACTORS, INDEX, finish_scores, open_scores, require_scores
from rankwise.storage import Precision
from rankwise.weights import needs_curvature, needs_factors, require_fit, rounding_plan
from rankwise.windows import cut_windows, read_texts
from rankwise.work import Work, learn_plan, measure, measure_curvature, measure_held_out, share
from rankwise.zoo import load_model, model_dtype, resolve_device


def compress_to_folder(config: CompressConfig, *, track: Track = silent) -> RankPlan:
    """From a model's name to a folder. Killed anywhere, the same call continues.

    Inside `distributed.joined` the processes share curvature, factors and the training of masks; the main one does the
    rest.

    Returns:
        The plan, as written into the checkpoint (with `score_only`: the plan of the method's own ratio).

    Raises:
        RankwiseError: bad input, or a full disk; nothing is left under `config.out`.
    """
    given = RankPlan.load(config.plan) if config.plan else None
    if given is not None and config.precision is not None:
        given = given.stored_as(config.precision, config.method.pins)
    if config.scores:
        require_scores(config.scores)
    resolve_device(config.device)
    raw = read_texts(config, needs_curvature(config, given))
    model, tokenizer = load_model(config.model, config.dtype)
    _check_model(config, given, model)
    windows = cut_windows(config, raw, model, tokenizer)
    if is_main():
        require_room_for(config, given, model, windows)
    identity = identify_job(config, model_dtype(model))
    with Job.open(config.out, identity, restart=config.restart) as job, disk_guard(config.out):
        work = Work(config, model, tokenizer, windows, job.folder, track)
        del model  # the other processes let go of it in `share`
        share(work, given)
        plan = from_main(lambda: _score(work) if config.score_only else _compress(work, given))
        if is_main():
            job.finish()
    return plan


def _check_model(config: CompressConfig, given: RankPlan | None, model: Any) -> None:
    """The plan fits the model, or the budget is within reach: known before work begins."""
    shapes = linear_shapes(model)
    if config.embeddings:
        find_ends(model)
    if config.precision is not None:
        rounded = {name: shape for name, shape in shapes.items() if not config.method.pins(name)}
        require_fit(config.precision, rounded, model_dtype(model))
    if config.budget is not None:
        require_budget(config, model)
    elif given is not None:
        check_plan(given, shapes)
    elif config.scores is None:
        config.method.check_budget(shapes)


def _compress(work: Work, given: RankPlan | None) -> RankPlan:
    config, model = work.config, work.model
    if config.out.exists():  # the last run was killed between the rename and the cleaning up
        return RankPlan.load(config.out / PLAN)
    plan, factors, curvature = _from_scores(work) if config.scores else _from_text(work, given)
    if config.embeddings:
        plan.embeddings = dict.fromkeys(find_ends(model), config.embeddings)
    elif given is not None:
        plan.embeddings = given.embeddings
    before = _perplexity(work)
    whole = plan.stored_as(Precision(model_dtype(model)))  # healing comes before rounding
    teacher = _teach(work) if config.heal > 0 and whole.compressed else None
    rounding: Rounding = nearest
    if plan.quantised and config.feeds_back and curvature is not None:
        fitted = teacher is not None or isinstance(factors, Refitted)
        rounding = _rounding(work, curvature, factors, fitted=fitted)
    device, made = resolve_device(config.device), plan if teacher is None else whole
    compress(model, made, factors, rounding=rounding, device=device, track=work.track)
    if teacher is not None:
        _heal(work, whole, teacher)
        round_layers(model, plan, rounding, track=work.track)
    after = _perplexity(work)
    if before is not None:
        plan.provenance["measured"] = {"windows": len(work.windows["measure"]), "dense": before, "compressed": after}
    plan.other_bytes = tensor_bytes(model) - plan.bytes
    save(model, work.tokenizer, plan, config.out, staging=work.folder / "checkpoint")
    return plan


Made = tuple[RankPlan, FactorStore | Refitted | None, Curvature | None]


def _from_text(work: Work, given: RankPlan | None) -> Made:
    """A plan, its factors (refitted if that is asked for; none where no layer is factored), and the curvature."""
    config, precision, weights = work.config, work.config.precision, model_dtype(work.model)
    if not needs_factors(config, given):
        plan = rounding_plan(given, precision, linear_shapes(work.model), weights, config.method.pins)
        curvature = measure_curvature(work) if config.feeds_back else None
        identity = {"measured": False} if curvature is None else curvature.identity
        plan.provenance = provenance(config, identity, weights)
        return plan, None, curvature
    store, curvature = measure(work, work.folder / FACTORS, given)
    if config.budget is None:
        plan, _ = _plan(work, given, store, curvature)
    else:
        best = plan_bytes(work, store, curvature)
        plan, store = best.plan, best.store
    plan = plan if precision is None else plan.stored_as(precision, config.method.pins)
    plan.provenance |= provenance(config, curvature.identity, weights)
    return plan, _refit(work, plan, store, curvature) if config.refits else store, curvature


def _from_scores(work: Work) -> Made:
    """A plan of the method and the text that the scores were made with."""
    config, weights = work.config, model_dtype(work.model)
    scores = open_scores(Path(str(config.scores)), work.model)
    plan, options = scores.allocate_in(config.precision, config.method.ratio, weights)
    plan.provenance = provenance(config, scores.facts["curvature"], weights)
    plan.provenance |= {"options": options, "calibration": scores.facts["calibration"]}
    return plan, scores.store, None


def _score(work: Work) -> RankPlan:
    """Factors, spectra and what the method learns, into the folder that the user asked for."""
    config, staged, weights = work.config, work.folder / "scores", model_dtype(work.model)
    if config.out.exists():
        return open_scores(config.out, work.model).allocate(config.method.ratio, weights)
    store, curvature = measure(work, staged / FACTORS)
    plan, learnt = _plan(work, None, store, curvature)
    if not (staged / INDEX).exists():
        facts = provenance(config, curvature.identity, weights)
        finish_scores(staged, facts, learnt)
    publish(staged, config.out)
    return plan


def _plan(work: Work, given: RankPlan | None, store: FactorStore, curvature: Curvature) -> tuple[RankPlan, Any]:
    """The plan, and every layer's choices with learnt losses if the method learns."""
    config, weights = work.config, model_dtype(work.model)
    if given is not None:
        check_factors(given, store)
        return config.method.restate(given, store, weights), None
    if not config.method.learns:
        return config.method.allocate(store, weights), None
    plan, calibration = learn_plan(work, store, curvature)
    return plan, calibration.learnt


def plan_bytes(work: Work, store: FactorStore, curvature: Curvature) -> Candidate:
    """The best plan under a byte budget that was tried, with its factors: of all channels, or of those that stay."""
    config, table = work.config, rounding_table(work, store, curvature)
    stores = {"": (store, table)}
    if config.narrows and (narrow := narrowed(work, store, curvature, table)):
        stores["fewer channels, "] = narrow, rounding_table(work, narrow, curvature)
    made: dict[str, Candidate] = {}
    for of, (some, table) in stores.items():
        rounding = _rounding(work, curvature, some, fitted=False) if config.feeds_back else nearest
        with suppress(RankwiseError) if made else nullcontext():  # with all channels there are plans already
            found = byte_plans(work, some, table)
            made |= {of + name: Candidate(plan, some, rounding) for name, plan in found.items()}
    near = nearest_of({name: candidate.plan for name, candidate in made.items()}, config.candidates)
    judges, kept, device = work.windows["judges"], work.folder / "candidates.json", resolve_device(config.device)
    return choose({name: made[name] for name in near}, work.model, judges, kept, device, work.track)


def _rounding(work: Work, curvature: Curvature, factors: FactorStore | Refitted | None, *, fitted: bool) -> Rounding:
    """By what the curvature says; the model is still dense."""
    held_out, folder = measure_held_out(work, curvature), work.folder / "rounded"
    store = factors.base if isinstance(factors, Refitted) else factors
    return make_rounding(work.config, work.model, curvature, folder, store, fitted=fitted, held_out=held_out)


def _refit(work: Work, plan: RankPlan, store: FactorStore, curvature: Curvature) -> FactorStore | Refitted:
    learn, judges = work.windows["learn"], work.windows["judges"]
    text = {"text": hash_windows(learn), "judges": hash_windows(judges)}
    identity = {"layers": plan.to_dict()["layers"], "curvature": curvature.identity, **text}
    into = Refitted(work.folder / "refit", store, identity)
    where: dict[str, Any] = {"device": resolve_device(work.config.device), "track": work.track}
    found = refit(work.model, plan, store, curvature, learn, judges, into, **where).outcomes()
    moved = sum(outcome.share is not None for outcome in found.values())
    best, losses = search_share(work.model, plan, into, curvature, judges, **where)
    shares = [{"share": share, "measured": loss} for share, loss in losses.items()]
    kept = min(losses, key=losses.__getitem__)
    gain = sum(outcome.gain for outcome in found.values())  # of the whole refit, as `moved` is
    plan.provenance["refit"] = {"layers": moved, "gain": gain, "shares": shares, "kept": kept}
    return best


def _healing_windows(work: Work) -> torch.Tensor:
    """What is distilled on, and behind it the windows that judge."""
    return torch.cat([work.windows["learn"], work.windows["judges"]])


def _teach(work: Work) -> Teacher:
    """What the dense model says of every window, on disk."""
    teacher = Teacher(work.folder / "teacher")
    model = work.model.to(roomy(resolve_device(work.config.device), work.model))
    teacher.listen(model, _healing_windows(work), track=work.track)
    model.to("cpu")
    return teacher


def _heal(work: Work, plan: RankPlan, teacher: Teacher) -> None:
    config, windows = work.config, _healing_windows(work)
    work.model.to(roomy(resolve_device(config.device), work.model))
    options = HealConfig(steps=config.heal, seed=config.text.seed)
    identity = {"plan": plan.to_dict(), "options": asdict(options), "text": hash_windows(windows)}
    judges = len(work.windows["judges"])
    names, folder = list(plan.compressed), work.folder
    healed = heal(work.model, names, teacher, windows, judges, options, folder, identity, track=work.track)
    work.model.to("cpu")
    plan.provenance["heal"] = {"steps": config.heal, "before": healed.before, "after": healed.best}


def _perplexity(work: Work) -> float | None:
    windows, model = work.windows["measure"], work.model
    if not len(windows):
        return None
    value = perplexity(model.to(roomy(resolve_device(work.config.device), model)), windows, track=work.track)
    model.to("cpu")
    return value
