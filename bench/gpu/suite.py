"""Everything that a GPU is asked for, in one command: correctness of every kernel, benchmarks of kernels and of the
runtime, then a table.

    python -m bench.gpu.suite                        into bench/results/<device>/<date>.jsonl
    python -m bench.gpu.suite --only K1 --only Q1    some lines; ids and families

A line whose answer is wrong is not timed. What does not fit into --minutes is left out and said so. Lines run in a
process of their own: one that ends it, hangs, or leaves the device unusable costs itself alone, and the next process
goes on behind it.
"""

import argparse
import datetime
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.gpu import measure as timing
from bench.gpu.judge import judged, line
from bench.gpu.lines import Lines, commit, gpu_table, versions
from bench.gpu.measure import LONG, Ceiling, error, quantiles
from bench.gpu.tests import check
from bench.gpu.work import Contest, Work

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("work", "measure", "suite", "lines", "tests", "models", "judge")
)
FIRST = ("K", "P", "Q1", "Q2", "T", "E", "S")  # how ids begin whose goals come before all others
SHARES = {"engine": 100.0}  # seconds of a run with all families after which no line of this one starts
PATIENCE = 150.0  # seconds without a line after which its process is taken to hang
GRACE = 30.0  # seconds beyond --minutes for the line that was begun in time
AGAIN = 75  # exit code of a process that leaves the lines behind its last one to another


def main() -> None:
    """Check, measure, write and print; the exit code says whether all ran and every answer was right."""
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this suite measures one")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = options.out or ROOT / "bench" / "results" / name / f"{datetime.date.today()}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"suite": "gpu", "device": torch.cuda.get_device_name(), "versions": versions(), "commit": commit()}
    lines = Lines(out, facts)
    if options.start is not None:
        measure(lines, options)
        return
    started = time.time()
    if not options.no_tests:
        tests = check(options.test_minutes)
        lines.write(tests)
        print(f"correctness: {tests['summary']}", flush=True)  # noqa: T201
    child = [sys.executable, "-m", "bench.gpu.suite", *sys.argv[1:]]
    watch(lines, works(options.only), started + 60 * options.minutes, child)
    summary = lines.summary()
    lines.write({"id": "summary", **summary})
    out.with_suffix(".md").write_text(gpu_table(lines.rows()), encoding="utf-8")
    print(json.dumps(summary, indent=1), flush=True)  # noqa: T201
    sys.exit(1 if summary["failed"] else 0)


def watch(lines: Lines, todo: list[tuple[str, Work]], until: float, child: Sequence[str]) -> None:
    """Measure all lines in a process of their own: one that a device's error ends is followed by another.

    Args:
        lines: the result file.
        todo: family and line, as the child has them too.
        until: no line starts after this time (seconds since 1970).
        child: command that measures from `--start` on.
    """
    done = 0
    while done < len(todo):
        seen, late = len(lines.rows()), time.time() > until
        command = [*child, "--start", str(done), "--out", str(lines.path), "--until", str(until)]
        end = {"left_out": "no time"} if late else ended(command, lines.path, until + GRACE)
        made = sum("family" in row for row in lines.rows()[seen:])
        done += made
        end = end or ({} if made else {"failed": "the process ended without a line"})
        if end and done < len(todo):
            family, work = todo[done]
            row = {"id": work.id, "name": work.name, "family": family, **end}
            lines.write(row)
            print(line(row), flush=True)  # noqa: T201
            done += 1


def ended(command: Sequence[str], path: Path, until: float) -> dict[str, str]:
    """Run a process that adds to a file until it ends, hangs or has to stop.

    Returns:
        What that says of the line it was at; nothing if it was at none.
    """
    run = subprocess.Popen(command, cwd=ROOT)
    size, heard = 0, time.time()
    try:
        while run.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                run.wait(1)
            now, before = time.time(), size
            size = path.stat().st_size if path.exists() else 0
            heard = now if size != before else heard
            if now > until:
                return {"left_out": "no time to end it"}
            if now - heard > PATIENCE:
                return {"failed": f"no answer in {PATIENCE:.0f} s"}
    finally:
        run.kill()
        run.wait()
    return {} if run.returncode in (0, AGAIN) else {"failed": f"the process ended with {run.returncode}"}


def measure(lines: Lines, options: argparse.Namespace) -> None:
    """The child's part: lines from `--start`, until one leaves the device unusable."""
    device = torch.device("cuda")
    top = timing.ceiling(device)
    lines.write({"id": "ceiling", "bandwidth": top.bandwidth, "flops": top.flops})
    print(f"ceiling: {top.bandwidth / 1e12:.2f} TB/s, {top.flops / 1e12:.0f} TFLOP/s", flush=True)  # noqa: T201
    spent: defaultdict[str, float] = defaultdict(float)
    for family, work in works(options.only)[options.start :]:
        started, share = time.time(), float("inf") if options.only else SHARES.get(family, float("inf"))
        late = started > options.until or spent[family] > share
        row = {"left_out": "no time"} if late else guarded(work, device, top)
        row = {"id": work.id, "name": work.name, "family": family, **row}
        lines.write(row)
        print(line(row), flush=True)  # noqa: T201
        spent[family] += time.time() - started
        if not timing.works_still(device):
            os._exit(AGAIN)  # what would be tidied up is lost with the device


def works(only: list[str] | None) -> list[tuple[str, Work]]:
    """All lines, or those whose id or family is named; those come first that must not be lost when time runs out.

    Goals of `FIRST`, other goals, the rest; within each the long ones late, and last whole models whose id was there.
    """
    found = [(family, work) for family in FAMILIES for work in importlib.import_module(f"bench.gpu.{family}").works()]
    kept = [(family, work) for family, work in found if not only or work.id in only or family in only]
    models: set[str] = set()
    places = []
    for _, work in kept:
        first = next((at for at, start in enumerate(FIRST) if work.id.startswith(start)), len(FIRST))
        other = bool(work.goals) and first == len(FIRST)
        places.append((not work.goals, other, work.id in models, work.once, first))
        models |= {work.id} if work.tokens else set()
    return [kept[at] for at in sorted(range(len(kept)), key=places.__getitem__)]


def guarded(work: Work, device: torch.device, top: Ceiling) -> dict[str, Any]:
    """A line's figures, or why there are none: one broken line does not cost the others."""
    try:
        return measured(work, device, top)
    except Exception as problem:
        return {"failed": f"{type(problem).__name__}: {problem}"[:500], "trace": traceback.format_exc()[-1500:]}
    finally:
        gc.collect()  # models and what an error holds on to
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def measured(work: Work, device: torch.device, top: Ceiling) -> dict[str, Any]:
    """Correctness first, then times, then what the goals say."""
    contests: list[Contest] = [work.build(device) for _ in range(timing.sets_for(work, device))]
    first = contests[0]
    seconds, answer = timing.time_once(first.ours)
    wrong = error(answer, first.reference())
    row: dict[str, Any] = {"error": wrong, "tolerance": first.tolerance, "sets": len(contests)}
    if not wrong <= first.tolerance:
        return row | {"failed": "wrong answer, not timed"}
    del answer
    if first.clock is not None:
        steps, row["broken_peers"] = first.clock()
        row |= {"seconds": {name: quantiles(each) for name, each in steps.items()}, "extra_bytes": {}}
    elif work.once:
        times, row["broken_peers"] = timing.time_peers_once(first.peers)
        row |= {"seconds": {"ours": quantiles([seconds])} | times, "extra_bytes": {}}
    else:
        row["seconds"], row["broken_peers"] = timing.time_work(work, contests)
        calls = {"ours": first.ours} | first.peers
        brief = [name for name, each in row["seconds"].items() if each["p50"] <= LONG]
        row["extra_bytes"] = {name: extra_bytes(calls[name]) for name in brief}
        row["warm"] = timing.is_warm(work, len(contests), device)
    ours = row["seconds"]["ours"]["p50"]
    row |= {"bytes": work.bytes, "flops": work.flops}
    row |= {"bandwidth": work.bytes / ours / top.bandwidth, "compute": work.flops / ours / top.flops}
    row |= {"rate": work.tokens / ours} if work.tokens else {}
    row["speedup"] = {name: t["p50"] / ours for name, t in row["seconds"].items() if name != "ours"}
    row["goals"] = [judged(goal, row) for goal in work.goals]
    return row


def extra_bytes(call: Any) -> int:
    """Device memory that a call takes beside its inputs, at its peak."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return int(torch.cuda.max_memory_allocated() - before)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="an id or a family; repeatable")
    parser.add_argument("--out", type=Path, help="append to this file")
    parser.add_argument("--minutes", type=float, default=9, help="start no line later than this")
    parser.add_argument("--test-minutes", type=float, default=4, help="for the tests of correctness")
    parser.add_argument("--no-tests", action="store_true", help="measure alone")
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
