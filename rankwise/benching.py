"""The command `rankwise bench`, and its numbers for other commands; what measures is `rankwise.bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.errors import RankwiseError
from rankwise.options import Device, Dtype, Json, Model, Seed

if TYPE_CHECKING:
    from rankwise.bench import BenchConfig

BATCHES, PROMPTS, ENGINES = (1, 8), (128,), ("rankwise", "transformers")


def bench(
    model: Model,
    against: Annotated[list[str] | None, typer.Option(help="Another model, usually the original; repeatable.")] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="rankwise, transformers, bitsandbytes or vllm; repeatable; default: the first two."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences side by side; repeatable; default: 1 and 8.")
    ] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Tokens of a prompt; repeatable; default: 128.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Output tokens a sequence.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds that count, after one that does not.")] = 5,
    load: Annotated[
        float | None, typer.Option(metavar="RATE", help="Also serve random arrivals, RATE a second.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Arrivals of a round.")] = 32,
    mix: Annotated[
        list[str] | None,
        typer.Option(metavar="PROMPT:OUTPUT", help="Tokens of arrivals; repeatable; default: 128:64, 512:32, 32:128."),
    ] = None,
    ttft_limit: Annotated[float, typer.Option(help="Seconds to the first token of a good request.")] = 2.0,
    tpot_limit: Annotated[float, typer.Option(help="Seconds a further token of a good request, its mean.")] = 0.2,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON lines and plots; must not exist.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure latency, throughput and memory of models and engines, which take turns in one run."""
    from rankwise.bench import BenchConfig, Load
    from rankwise.bench.config import MIX

    arrivals = None
    if load is not None:
        kinds = tuple(map(_pair, mix)) if mix else MIX
        arrivals = Load(load, requests, kinds, ttft_limit, tpot_limit, seed)
    shapes = tuple(prompt or PROMPTS), new_tokens, tuple(batch or BATCHES)
    config = BenchConfig(*shapes, rounds, device, dtype, arrivals)
    _run([model, *(against or [])], engine or list(ENGINES), config, out, as_json)


def _run(models: list[str], engines: list[str], config: "BenchConfig", out: Path | None, as_json: bool) -> None:
    from rankwise import bench as speed
    from rankwise import commands, console
    from rankwise.bench.plots import write_results
    from rankwise.config import check
    from rankwise.progress import on_terminal

    check("out", str(out), out is None or not out.exists(), "a folder that does not exist yet")
    found = speed.bench(speed.line_up(models, engines, config.device), config, track=on_terminal)
    for row in (*found["rows"], *found["load"]):
        row["ratio"] = commands.kept_share(row["name"])
    console.speed_tables(found)
    if out is not None:
        write_results(found, out)
        console.show(f"results and plots: {out}")
    if as_json:
        console.print_json(found)


def _pair(text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise RankwiseError("mix", text, "allowed: PROMPT:OUTPUT, two whole numbers")
    return int(parts[0]), int(parts[1])


def add_speed(rows: Sequence[dict[str, Any]], config: "BenchConfig") -> list[dict[str, Any]]:
    """The rows with times of the runtime beside them, under the names that the report has for them."""
    from rankwise import bench as speed
    from rankwise.progress import on_terminal

    models = [row["name"] for row in rows]
    timed = {}
    for found in speed.bench(speed.line_up(models, ["rankwise"]), config, track=on_terminal)["rows"]:
        names = {"prefill_ms": "ttft_ms", "decode_ms": "tpot_ms"}
        times = {f"{ours}_p{p}": found[f"{theirs}_p{p}"] for ours, theirs in names.items() for p in (50, 95)}
        timed[found["name"]] = {**found, **times, "tokens_per_s": found["decode_tokens_per_s"]}
    return [{**timed[row["name"]], **row} for row in rows]
