"""One harness for benches of quality: cases in, one JSON line each out, resumable, every case in a process of its own.

A case says which method with which options, what it is calibrated on and what it learns from. Curvature and factors
are made once for every calibration and shared by the cases that have it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.sheet import append
from bench.texts import add_text_options, test_windows, train_windows
from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import FORMAT, Curvature, collect, hash_windows
from rankwise.alloc.heal import HealConfig, heal
from rankwise.alloc.methods import METHODS, Method
from rankwise.alloc.refit import refit
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore
from rankwise.alloc.teacher import Teacher
from rankwise.evaluate import perplexity
from rankwise.factoring import factors_name, make_factors
from rankwise.files import digest
from rankwise.linesearch import search_share
from rankwise.pipeline import compress
from rankwise.plan import RankPlan
from rankwise.progress import on_terminal
from rankwise.provenance import versions
from rankwise.windows import JUDGES
from rankwise.zoo import EMBEDDED, load_model, model_dtype, quiet_transformers

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
SHARED_PROBES = ("strs", "asvd")  # their measurements serve all ratios


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        name: in the table.
        method: of `--method`; empty is the dense model.
        ratio: share to keep.
        settings: options of the method.
        refit: refit its factors, to the calibration text and the text that other methods learn masks from.
        heal: steps of distillation after that, one window of `learn` each.
        calibration: domain of the curvature.
        samples: windows for the input moments.
        gradient_samples: windows for the output gradients.
        learn: domains that masks are trained on, in turn; a refit is fitted to them, too.
        seed: of everything drawn at random.
        tests: domains to test on.
    """

    name: str
    method: str
    ratio: float
    settings: dict[str, Any] = field(default_factory=dict)
    refit: bool = False
    heal: int = 0
    calibration: str = "wikitext2"
    samples: int = 64
    gradient_samples: int = 24
    learn: tuple[str, ...] = ("wikitext2", "c4")
    seed: int = 0
    tests: tuple[str, ...] = ("wikitext2", "c4")

    def judges(self, train: torch.Tensor) -> torch.Tensor:
        """The windows of the calibration's text that nothing is fitted to."""
        return train[max(self.samples, self.gradient_samples) :][:JUDGES]

    @property
    def learns_from(self) -> int:
        """The first window of the calibration's text that methods may learn from."""
        return max(self.samples + self.gradient_samples, max(self.samples, self.gradient_samples) + JUDGES)

    @property
    def key(self) -> str:
        """Short and safe as a folder's name."""
        return digest(asdict(self), 12)


def run(bench: str, cases: Sequence[Case], description: str) -> list[dict[str, Any]]:
    """Measure every case whose row is missing; all rows, in the order of the cases."""
    options = parse(bench, description)
    quiet_transformers()
    if options.case is not None:
        print(json.dumps(measure(next(c for c in cases if c.key == options.case), options)))  # noqa: T201
        return []
    facts = identity(bench, options)
    rows = kept_rows(options.out, facts)
    require_metric(rows, {case.key: metric(case, options) for case in cases}, options.out)
    for case in cases:
        if not wanted(case, options) or case.key in {row["key"] for row in rows}:
            continue
        row = facts | metric(case, options) | {"key": case.key, **json.loads(json.dumps(asdict(case)))}
        row |= in_process(bench, case)
        rows.append(row)
        append(options.out, row)
        figures = "  ".join(f"{test} {value:.2f}" for test, value in row["perplexity"].items())
        print(f"{case.name:36} kept {case.ratio:.2f}  {figures}  {row['seconds']:.0f} s", flush=True)  # noqa: T201
    return rows


def wanted(case: Case, options: argparse.Namespace) -> bool:
    """Whether this command measures a case; the dense model is in every run."""
    named = not options.only or any(part == f"={case.name}" or part in case.name for part in options.only)
    return not case.method or (named and (not options.at or case.ratio in options.at))


def in_process(bench: str, case: Case) -> dict[str, Any]:
    """One row's figures, from a child; they are the last line that it prints."""
    command = [sys.executable, "-m", f"bench.{bench}", *sys.argv[1:], "--case", case.key]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case.name} at {case.ratio}: exit code {done.returncode}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The child's part: allocate, compress, evaluate."""
    model, tokenizer = load_model(options.model, options.dtype)
    facts: dict[str, Any] = {}
    started = time.monotonic()
    if case.method:
        calibration, prepared = calibrate(case, model, tokenizer, options)
        started += prepared  # curvature and factors are shared; their time is a row's own only in `prepared_seconds`
        facts = put(case, calibration, tokenizer, options) | {"prepared_seconds": round(prepared, 1)}
    facts["seconds"] = round(time.monotonic() - started, 1)
    facts["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tests = {domain: test_windows(domain, options, tokenizer) for domain in case.tests}
    facts["perplexity"] = {domain: perplexity(model, test, track=on_terminal) for domain, test in tests.items()}
    return facts


def put(case: Case, calibration: Calibration, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Compress the calibration's model in place; what the plan came to."""
    model, store, method = calibration.model, calibration.factors, build(case, options)
    plan = method.allocate(store, model_dtype(model), calibration if method.learns else None)
    plan.save(options.work / "plans" / f"{case.key}.json")
    losses = [spec.loss for _, spec in plan if spec.loss is not None]
    found = {"measured_ratio": plan.ratio, "kinds": plan.counts(), "options": method.options()}
    found["shares"] = [round(spec.ratio, 4) for _, spec in plan]
    found["predicted_loss"] = sum(losses) if losses else None
    fit, judges = refit_texts(case, calibration, tokenizer, options)
    target: FactorStore | Refitted = store
    if case.refit:
        whole = refitted(calibration, plan, fit, judges, options.work)
        found["refitted"] = sum(share is not None for share, _ in whole.outcomes().values())
        how: dict[str, Any] = {"device": CPU, "track": on_terminal}
        target, losses = search_share(model, plan, whole, calibration.curvature, judges, **how)
        found["shares_tried"] = {f"{share:g}": round(loss, 5) for share, loss in losses.items()}
    if not case.heal:
        compress(model, plan, target)
        return found
    windows = torch.cat([calibration.windows[: case.heal], judges])
    teacher = Teacher(options.work / "teacher" / hash_windows(windows))
    teacher.listen(model, windows, track=on_terminal)
    compress(model, plan, target)
    how, place = HealConfig(steps=case.heal, seed=case.seed), calibration.folder
    names, identity = list(plan.compressed), {"case": case.key}
    healed = heal(model, names, teacher, windows, len(judges), how, place, identity, track=on_terminal)
    return found | {"healed": {"before": healed.before, "after": healed.best, "lr": how.lr}}


def refit_texts(
    case: Case, calibration: Calibration, tokenizer: Any, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows that a refit is fitted to, and those that judge."""
    train = train_windows(case.calibration, options, tokenizer)
    return torch.cat([train[: case.samples], calibration.windows]), case.judges(train)


def refitted(calibration: Calibration, plan: RankPlan, fit: torch.Tensor, judges: torch.Tensor, work: Path) -> Refitted:
    """The plan's factors, refitted or found: rows with the same plan share them."""
    text = {"fitted": hash_windows(fit), "judges": hash_windows(judges)}
    identity = {"layers": plan.to_dict()["layers"], "curvature": calibration.curvature.identity, **text}
    name = digest(identity, 12)
    into = Refitted(work / "refit" / name, calibration.factors, identity)
    model, store, curvature = calibration.model, calibration.factors, calibration.curvature
    return refit(model, plan, store, curvature, fit, judges, into, device=CPU, track=on_terminal)


def build(case: Case, options: argparse.Namespace) -> Method:
    """The case's method, with the bench's own number of steps where the case does not say."""
    made = METHODS[case.method]
    own = {key: getattr(options, key) for key in ("steps", "train_len") if hasattr(made, key)}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in case.settings.items()}
    return made(**({"ratio": case.ratio, "rank_multiple": options.rank_multiple} | own | settings))


def calibrate(case: Case, model: Any, tokenizer: Any, options: argparse.Namespace) -> tuple[Calibration, float]:
    """Curvature and factors, made or found, and what the method learns from; seconds that the former took."""
    started, method = time.monotonic(), build(case, options)
    sides = str(method.sides)
    where = options.work / f"{case.calibration}-{case.samples}-{case.gradient_samples}"
    train = train_windows(case.calibration, options, tokenizer)
    inputs, gradients = train[: case.samples], train[: case.gradient_samples]
    curvature: Curvature = collect(model, inputs, gradients, where / "curvature", device=CPU, track=on_terminal)
    folder = where / factors_name(method)
    store = make_factors(model, curvature, method, inputs[:1], folder, device=CPU, track=on_terminal)
    spent = time.monotonic() - started
    parts = []
    for domain in case.learn:
        found = train_windows(domain, options, tokenizer)
        parts.append(found[case.learns_from :] if domain == case.calibration else found)
    learn = train[:0]
    if parts:
        count = min(options.learn_samples // len(parts), *(len(part) for part in parts))
        learn = torch.stack([part[:count] for part in parts], dim=1).flatten(0, 1)  # the domains in turn
    shared = f"{case.method}-{sides}-{case.calibration}-{case.samples}-{case.gradient_samples}"
    folder = options.work / "learning" / (shared if case.method in SHARED_PROBES else case.key)
    return Calibration(model, store, curvature, learn, folder, CPU, case.seed, on_terminal), spent


def identity(bench: str, options: argparse.Namespace) -> dict[str, Any]:
    """What every row of a run carries; rows of another run are not continued."""
    keys = ("model", "dtype", "learn_samples", "seq_len", "windows", "steps", "train_len", "rank_multiple")
    texts = {key: Path(getattr(options, key)).name for key in ("train", "test", "c4")}
    return {"bench": bench, "device": "cpu", "versions": versions(), **texts} | {k: getattr(options, k) for k in keys}


def metric(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """What rows that see output gradients carry beside: in which form these were summed."""
    sees = case.method and (case.refit or build(case, options).two_sided)
    return {"curvature": FORMAT} if sees else {}


def kept_rows(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier, interrupted command of the same run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    different = sorted({key for row in rows for key, value in facts.items() if row.get(key) != value})
    if different:
        sys.exit(f"{path} holds rows of a run with other {', '.join(different)}: give --out, or remove it")
    return rows


def require_metric(
    rows: list[dict[str, Any]], metrics: dict[str, dict[str, Any]], path: Path, key: str = "key"
) -> None:
    """Refuse rows whose output gradients were summed in another form; `metrics` by what rows hold under `key`."""
    old = [row["name"] for row in rows if row.get("curvature") != metrics.get(row[key], row).get("curvature")]
    if old:
        sys.exit(f"{path}: {', '.join(old)} were measured with another curvature: give --out, or remove these rows")


def parse(bench: str, description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line, or of these arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--only", action="append", help="the rows whose name contains this, or is it after =")
    parser.add_argument("--at", action="append", type=float, help="measure the rows of this ratio; repeatable")
    parser.add_argument("--learn-samples", type=int, default=160, help="windows that masks are trained on")
    parser.add_argument("--steps", type=int, default=256, help="of every method that trains masks")
    parser.add_argument("--train-len", type=int, default=512, help="tokens a training step")
    parser.add_argument("--rank-multiple", type=int, default=8)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="curvature, factors, training states")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / f"{bench}.jsonl")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)
