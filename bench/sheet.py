"""What every table is made of: rows of a result file, and Markdown."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a result file."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def exists(name: str) -> bool:
    """Whether a result file is there."""
    return (RESULTS / name).exists()


def versions(row: dict[str, Any]) -> str:
    """Of everything but rankwise itself."""
    return ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name != "rankwise")


def calibration(row: dict[str, Any]) -> str:
    """Which windows of which text."""
    return f"{row['samples']} windows of `{row['train']}`, output gradients on the first {row['gradient_samples']}"


def markdown(heads: list[str], body: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [heads, ["---", *(["---:"] * (len(heads) - 1))], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
