"""Everything that a GPU is asked for, in one command: correctness of every kernel, then every benchmark, then a table.

    python -m bench.gpu.suite                        into bench/results/<device>/<date>.jsonl
    python -m bench.gpu.suite --only K1 --only Q1    some lines; ids and families

A line whose answer is wrong is not timed. What does not fit into --minutes is left out and said so.
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench.gpu.measure import Ceiling, ceiling, error, sets_for, time_work
from bench.gpu.work import Contest, Goal, Work

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("work", "measure", "suite", "__init__")
)


def main() -> None:
    """Check, measure, write and print."""
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this suite measures one")
    device = torch.device("cuda")
    started, name = time.monotonic(), re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = options.out or ROOT / "bench" / "results" / name / f"{datetime.date.today()}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"suite": "gpu", "device": torch.cuda.get_device_name(), "versions": versions(), "commit": commit()}
    with out.open("a", encoding="utf-8") as file:
        if not options.no_tests:
            tests = check(options.test_minutes)
            write(file, facts | tests)
            print(f"correctness: {tests['summary']}", flush=True)  # noqa: T201
        top = ceiling(device)
        write(file, facts | {"id": "ceiling", "bandwidth": top.bandwidth, "flops": top.flops})
        print(f"ceiling: {top.bandwidth / 1e12:.2f} TB/s, {top.flops / 1e12:.0f} TFLOP/s", flush=True)  # noqa: T201
        for family, work in works(options.only):
            late = time.monotonic() - started > 60 * options.minutes
            row = {"left_out": "no time"} if late else guarded(work, device, top)
            row = {"id": work.id, "name": work.name, "family": family, **row}
            write(file, facts | row)
            print(line(row), flush=True)  # noqa: T201


def works(only: list[str] | None) -> list[tuple[str, Work]]:
    """All lines, or those whose id or family is named."""
    found = [(family, work) for family in FAMILIES for work in importlib.import_module(f"bench.gpu.{family}").works()]
    return [(family, work) for family, work in found if not only or work.id in only or family in only]


def guarded(work: Work, device: torch.device, top: Ceiling) -> dict[str, Any]:
    """A line's figures, or why there are none: one broken line does not cost the others."""
    try:
        return measured(work, device, top)
    except Exception as problem:
        torch.cuda.synchronize()
        return {"failed": f"{type(problem).__name__}: {problem}"[:500], "trace": traceback.format_exc()[-1500:]}
    finally:
        torch.cuda.empty_cache()


def measured(work: Work, device: torch.device, top: Ceiling) -> dict[str, Any]:
    """Correctness first, then times, then what the goals say."""
    contests: list[Contest] = [work.build(device) for _ in range(sets_for(work, device))]
    wrong = error(contests[0].ours(), contests[0].reference())
    row: dict[str, Any] = {"error": wrong, "tolerance": contests[0].tolerance, "sets": len(contests)}
    if not wrong <= contests[0].tolerance:
        return row | {"failed": "wrong answer, not timed"}
    calls = {"ours": contests[0].ours} | contests[0].peers
    row["extra_bytes"] = {name: extra_bytes(call) for name, call in calls.items()}
    row["seconds"] = time_work(work, contests)
    ours = row["seconds"]["ours"]["p50"]
    row |= {"bytes": work.bytes, "flops": work.flops}
    row |= {"bandwidth": work.bytes / ours / top.bandwidth, "compute": work.flops / ours / top.flops}
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


def judged(goal: Goal, row: dict[str, Any]) -> dict[str, Any]:
    """A goal with the figure that was reached; peers are named by how they begin."""
    ours = row["seconds"]["ours"]["p50"]
    figures = {"microseconds": ours * 1e6, "seconds": ours, "bandwidth": row["bandwidth"]}
    memory = {name: row["extra_bytes"]["ours"] / max(1, extra) for name, extra in row["extra_bytes"].items()}
    peers = {"speedup": row["speedup"], "memory": memory}
    if goal.figure in peers:
        found = [value for name, value in peers[goal.figure].items() if name.startswith(goal.peer)]
        reached = min(found) if found else None
    else:
        reached = figures[goal.figure]
    less = goal.figure in ("microseconds", "seconds", "memory")
    met = reached is not None and (reached <= goal.at if less else reached >= goal.at)
    return {"figure": goal.figure, "peer": goal.peer, "goal": goal.at, "reached": reached, "met": met}


def line(row: dict[str, Any]) -> str:
    """One line for a person."""
    head = f"{row['id']:4} {row['name'][:52]:52}"
    if "seconds" not in row:
        return f"{head} {row.get('failed') or row.get('left_out')}"
    ours = row["seconds"]["ours"]["p50"] * 1e6
    peers = "  ".join(f"{name} {value:.2f}x" for name, value in row["speedup"].items())
    missed = [
        f"{g['figure']} {g['peer']} {g['reached'] and round(g['reached'], 3)} for {g['goal']}"
        for g in row["goals"]
        if not g["met"]
    ]
    verdict = "missed: " + ", ".join(missed) if missed else "met" if row["goals"] else ""
    shares = f"{100 * row['bandwidth']:3.0f} % bw  {100 * row['compute']:3.0f} % flops"
    return f"{head} {ours:10.2f} us  {shares}  {peers}  {verdict}"


def check(minutes: float) -> dict[str, Any]:
    """The project's own tests of kernels, on this device."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels",
        "-q",
        "--ignore=tests/kernels/test_compiled.py",
        "-p",
        "no:cacheprovider",
        *(["-n", "8"] if importlib.util.find_spec("xdist") else []),  # most of the time goes into compiling
    ]
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes, check=False)
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        output, code = (late.stdout or b"").decode(), None
    print(output[-6000:] if code else "", flush=True)  # noqa: T201
    tail = output.strip().splitlines()[-1:] or ["nothing"]
    failed = re.findall(r"^FAILED (.+)$", output, re.MULTILINE)
    return {"id": "tests", "summary": tail[0], "exit": code, "failed_tests": failed, "wall": time.monotonic() - started}


def versions() -> dict[str, str]:
    """Of what decides over speed."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "bitsandbytes"):
        try:
            found[name] = importlib.import_module(name).__version__
        except Exception as missing:
            found[name] = f"none ({type(missing).__name__})"
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found | {"driver and clocks": driver.stdout.strip()}


def commit() -> str:
    """Of the tree that is measured; `RANKWISE_COMMIT` where it is no repository."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return os.environ.get("RANKWISE_COMMIT") or found.stdout.strip() or "unknown"


def write(file: Any, row: dict[str, Any]) -> None:
    """One JSON line, on disk at once."""
    file.write(json.dumps(row) + "\n")
    file.flush()


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="an id or a family; repeatable")
    parser.add_argument("--out", type=Path, help="append to this file")
    parser.add_argument("--minutes", type=float, default=9, help="start no line later than this")
    parser.add_argument("--test-minutes", type=float, default=4, help="for the tests of correctness")
    parser.add_argument("--no-tests", action="store_true", help="measure alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
