"""What every table is made of: rows of a result file, and Markdown."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a result file."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a result file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def exists(name: str) -> bool:
    """Whether a result file is there."""
    return (RESULTS / name).exists()


def versions(row: dict[str, Any]) -> str:
    """Of everything but rankwise itself."""
    return ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name != "rankwise")


def calibration(row: dict[str, Any]) -> str:
    """Which windows of which text."""
    return f"{row['samples']} windows of `{row['train']}`, output gradients on the first {row['gradient_samples']}"


def with_spread(ratio: list[float]) -> str:
    """A ratio's median, and p20 to p80, from a row that has all three."""
    low, middle, high = ratio
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def made_of(plan: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """How many layers of a plan are of each kind and precision, the commonest first."""
    return dict(Counter(f"{spec.kind}, {spec.precision}" for _, spec in plan).most_common())


def markdown(heads: list[str], body: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [heads, ["---", *(["---:"] * (len(heads) - 1))], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
