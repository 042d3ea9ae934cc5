"""What the commands of the CLI do: call the library, print tables for people or JSON for scripts."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rankwise import bench as speed
from rankwise import console, generating
from rankwise.alloc.methods import METHODS
from rankwise.alloc.options import own_options
from rankwise.anatomy import require_context
from rankwise.benching import add_speed
from rankwise.budgets import budget_met
from rankwise.compression import compress_to_folder
from rankwise.config import CompressConfig, TextConfig, check, check_count, check_seed
from rankwise.distributed import is_main, joined, speaks
from rankwise.engine.checkpoint import folder_bytes, is_rankwise, open_checkpoint
from rankwise.engine.checkpoint import verify as verify_checkpoint
from rankwise.engine.runtime.params import SamplingParams
from rankwise.evaluate import perplexity
from rankwise.plan import RankPlan
from rankwise.progress import on_terminal, silent
from rankwise.tasks import Chosen, Measure, measurer, nothing
from rankwise.text import read_text, take_windows, token_windows
from rankwise.zoo import EMBEDDED, disk_bytes, load_model, local_folder, model_dtype, quiet_transformers

Row = dict[str, Any]
quiet_transformers()


def compress(config: CompressConfig, as_json: bool) -> None:
    """`rankwise compress`."""
    with joined(config.device):
        plan = compress_to_folder(config, track=on_terminal if is_main() else silent)
    if not speaks():
        return
    if config.score_only:
        console.show(
            f"{config.out}: scores; now rankwise compress {config.model} --from {config.out} --ratio R --out O"
        )
        if as_json:
            console.print_json({"out": str(config.out), "ratio": plan.ratio, **plan.counts()})
        return
    size = folder_bytes(config.out)
    facts: Row = {"out": str(config.out), "ratio": plan.ratio, "bits": plan.bits, "bytes": size, **plan.counts()}
    measured = plan.provenance.get("measured", {})
    if measured:
        facts |= {"perplexity": measured["compressed"], "dense_perplexity": measured["dense"]}
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.counts().items() if count)
    console.show(f"{config.out}: {plan.ratio:.2%} of the linear layers kept ({kinds}), {size / 1e6:.1f} MB")
    if config.budget is not None:
        console.show(budget_met(config.budget, plan.bits, size, config.method.tolerance))
    if plan.provenance.get("curvature") == {"measured": False}:
        console.show("no calibration: every layer stays dense and is rounded to the nearest codes")
    if measured:
        windows = f"{measured['windows']} held-out windows of the calibration text"
        before, after = (console.number(measured[key], ".2f") for key in ("dense", "compressed"))
        console.show(f"perplexity {before} → {after} on {windows}")
    if as_json:
        console.print_json(facts)


def methods(as_json: bool) -> None:
    """`rankwise methods`."""
    rows = []
    for name, method in METHODS.items():
        what = (method.__doc__ or "").strip().splitlines()[0]
        own = ", ".join(f"{key}={field.default}" for key, field in own_options(method).items())
        rows.append({"method": name, "what": what, "sides": method.default_sides, "learns": method.learns, "set": own})
    if as_json:
        console.print_json({"methods": rows})
        return
    console.method_table(rows)


def inspect(folder: Path, verify: bool, as_json: bool) -> None:
    """`rankwise inspect`."""
    hashed = verify_checkpoint(folder) if verify else None
    plan, _ = open_checkpoint(folder)
    size = folder_bytes(folder)
    rows = [console.plan_row(name, plan) for name in plan.layers]
    if as_json:
        facts: Row = {"ratio": plan.ratio, "bits": plan.bits, "bytes": size, "planned_bytes": plan.total_bytes}
        facts |= {"embeddings": plan.embeddings, "verified_files": hashed}
        console.print_json({**facts, "layers": rows, "provenance": plan.provenance})
        return
    console.plan_table(plan, str(folder))
    planned = f", plan says {plan.total_bytes / 1e6:.1f} MB" if plan.other_bytes else ""
    kept = f"{plan.ratio:.2%} of the listed layers kept, in {plan.bits:.2f} bits for each number that was there"
    console.show(f"{kept}; {size / 1e6:.1f} MB on disk{planned}")
    for name, weights in plan.embeddings.items():
        console.show(f"{name}: {weights}")
    if hashed is not None:
        console.show(f"verified: {hashed} files have the SHA-256 that SHA256SUMS lists; tensors and plan agree")


def evaluate(
    models: Sequence[str], text: str, windows: int, seq_len: int, tasks: Chosen, device: str, dtype: str, as_json: bool
) -> None:
    """`rankwise eval`."""
    rows = quality(models, text, windows, seq_len, device, dtype, measurer(*tasks, track=on_terminal))
    console.task_table(rows)
    _print_models(rows, rows[0]["text"], as_json)


def generate(
    source: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    chat: bool,
    draft: str | None,
    device: str,
    dtype: str,
    seed: int,
    max_model_len: int | None,
    as_json: bool,
) -> None:
    """`rankwise generate`."""
    check_count("max_tokens", max_tokens, 1)
    check("temperature", temperature, 0 <= temperature < float("inf"), "0 or more")
    check("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")
    check("prompt", prompt, bool(prompt), "some text")
    check_seed(seed)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    asked = generating.Asked(source, prompt, params, draft, chat, max_model_len, device, dtype, as_json)
    generating.generate(asked)


def demo(out: Path, ratio: float, as_json: bool) -> None:
    """`rankwise demo`."""
    from rankwise.alloc.methods import Global, Uniform
    from rankwise.report import write_report

    check("out", str(out), not out.exists() or _unfinished(out), "a folder that does not exist yet")
    text = TextConfig(samples=24, gradient_samples=12, seq_len=512, measure=0, shuffle=True)
    entries = {"uniform": Uniform(ratio, kinds=("lowrank",)), "global": Global(ratio)}
    for name, method in entries.items():
        if not (out / name).exists():
            console.show(f"compress {EMBEDDED} with --method {name} --ratio {ratio:g}")
            config = CompressConfig(EMBEDDED, out / name, method, text, curvature=out / "curvature")
            compress_to_folder(config, track=on_terminal)
    models = [EMBEDDED, *(str(out / name) for name in entries)]
    rows = add_speed(quality(models, "embedded:python-docs-test", 16, 512, "auto", "auto"), speed.BenchConfig())
    plan = RankPlan.load(out / "global" / "plan.json")
    page = write_report(plan, rows, out / "report", title=f"{EMBEDDED}, {ratio:.0%} kept")
    console.model_table(rows, f"{EMBEDDED}: {rows[0]['text']}")
    console.show(f"report: {page}")
    console.show(f"next: rankwise generate {out / 'global'} 'The capital of France is'")
    if as_json:
        console.print_json({"report": str(page), "rows": rows})


def quality(
    models: Sequence[str], text: str, windows: int, seq_len: int, device: str, dtype: str, also: Measure = nothing
) -> list[Row]:
    """Perplexity of each model on the same text, as rows; and what else `also` measures."""
    check_count("windows", windows, 1)
    check_count("seq_len", seq_len, 2)
    raw = read_text(text, split="test")
    rows = []
    for name in models:
        model, tokenizer = load_model(name, dtype, device)
        require_context(model, seq_len)
        taken = take_windows(token_windows(raw, tokenizer, seq_len), windows, text)
        stored = model_dtype(model)
        rows.append(
            {
                "name": name,
                "ratio": kept_share(name),
                "weight_bytes": disk_bytes(name, dtype),
                "perplexity": perplexity(model, taken, track=on_terminal),
                "text": f"{text}, first {windows} windows of {seq_len} tokens, {stored}",
                **also(model, tokenizer),
            }
        )
        del model
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is no GPU
    return rows


def kept_share(name: str) -> float | None:
    """Kept share; None where a folder was re-saved without the plan that lists its dense layers."""
    folder = local_folder(name)
    if folder is None or not is_rankwise(folder):
        return 1.0
    path = folder / "plan.json"
    return RankPlan.load(path).ratio if path.is_file() else None


def _unfinished(out: Path) -> bool:
    return not (out / "report").exists() and (out / "curvature").exists()


def _print_models(rows: Sequence[Mapping[str, Any]], title: str, as_json: bool) -> None:
    console.model_table(rows, title)
    if as_json:
        first, *rest = rows
        console.print_json({**first, **({"against": rest[0]} if rest else {})})
