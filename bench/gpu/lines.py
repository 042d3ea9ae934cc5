"""The result file of the GPU suite: JSON lines on disk at once, what they come to, and a table of them."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.sheet import append

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Lines:
    """A result file.

    Args:
        path: where it is; lines are added.
        facts: that every line carries: device, versions, commit.
    """

    path: Path
    facts: dict[str, Any]

    def write(self, row: dict[str, Any]) -> None:
        """Add one line, on disk when this returns."""
        append(self.path, self.facts | row)

    def rows(self) -> list[dict[str, Any]]:
        """Those of this commit."""
        if not self.path.exists():
            return []
        found = [json.loads(text) for text in self.path.read_text(encoding="utf-8").splitlines()]
        return [row for row in found if row.get("commit") == self.facts["commit"]]

    def summary(self) -> dict[str, Any]:
        """Which goals were met, which were missed and by how much, what failed, what was left out."""
        latest = last(self.rows())
        goals = [(row, goal) for row in latest for goal in row.get("goals", [])]
        missed = [f"{row['id']} {row['name']}: {told(goal)}" for row, goal in goals if not goal["met"]]
        failed = [f"{row['id']} {row['name']}: {row['failed']}" for row in latest if row.get("failed")]
        tests = [row for row in self.rows() if row["id"] == "tests"][-1:]
        failed += [f"tests: {row['summary']}" for row in tests if row["exit"] != 0]
        left = [f"{row['id']} {row['name']}" for row in latest if row.get("left_out")]
        broken = [
            f"{row['id']} {row['name']}: {peer}: {why}"
            for row in latest
            for peer, why in row.get("broken_peers", {}).items()
        ]
        met = sum(goal["met"] for _, goal in goals)
        return {"met": met, "missed": missed, "failed": failed, "broken_peers": broken, "left_out": left}


def last(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured lines, each in its newest version."""
    return list({(row["family"], row["id"], row["name"]): row for row in rows if "family" in row}.values())


def told(goal: dict[str, Any]) -> str:
    """A goal with what was reached."""
    reached = "not measured" if goal["reached"] is None else f"{goal['reached']:.3g}"
    reached += " ({:.3g} to {:.3g})".format(*goal["spread"]) if "spread" in goal else ""
    return " ".join(filter(None, (goal["figure"], goal["peer"], reached, "for", f"{goal['goal']:g}")))


def beside(row: dict[str, Any]) -> list[str]:
    """Every peer with our speed-up over it, or why it did not run."""
    found = [f"{value:.2f} × {name}" for name, value in row["speedup"].items()]
    return found + [f"{name} broken ({why[:80]})" for name, why in row.get("broken_peers", {}).items()]


def gpu_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one row a line of the suite."""
    top = [row for row in rows if row["id"] == "ceiling"][-1:]
    head = (
        "| id | work | µs p50 (p20 to p80) | bandwidth | against | goals |\n| --- | --- | ---: | ---: | --- | --- |\n"
    )
    body = "".join(f"| {row['id']} | {row['name']} | {_cells(row)} |\n" for row in last(rows))
    end = ""
    for row in top:
        facts = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        ceiling = f"{row['bandwidth'] / 1e12:.2f} TB/s copied, {row['flops'] / 1e12:.0f} TFLOP/s in bf16"
        end = f"\n{row['device']}, commit {row['commit']}; ceiling in the same run: {ceiling}. {facts}.\n"
    return head + body + end


def _cells(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return f"{row.get('failed') or row.get('left_out')} | | | "
    time = row["seconds"]["ours"]
    micro = f"{time['p50'] * 1e6:.2f} ({time['p20'] * 1e6:.2f} to {time['p80'] * 1e6:.2f})"
    micro += f", {row['rate']:.0f} tokens/s" if "rate" in row else ""
    micro += ", warm" if row.get("warm") else ""
    peers = ", ".join(beside(row)).replace("|", "/")
    goals = ", ".join(f"{'met' if goal['met'] else 'missed'}: {told(goal)}" for goal in row["goals"])
    return f"{micro} | {100 * row['bandwidth']:.0f} % | {peers} | {goals}"


def versions() -> dict[str, str]:
    """Of what decides over speed."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "transformers", "bitsandbytes"):
        try:
            found[name] = importlib.import_module(name).__version__
        except Exception as missing:
            found[name] = f"none ({type(missing).__name__})"
    query = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
    return found | {"driver and clocks": output_of(*query)}


def commit() -> str:
    """Of the tree that is measured; `RANKWISE_COMMIT` where it is no repository."""
    return os.environ.get("RANKWISE_COMMIT") or output_of("git", "rev-parse", "--short", "HEAD") or "unknown"


def output_of(*command: str) -> str:
    """What a command prints; nothing if it is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
