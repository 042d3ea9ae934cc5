"""How the page writes a row's numbers: units, changes, what was not measured, and under which settings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"
QUALITY = {"text": "{}"}  # keys of a row that say how its numbers were measured
SPEED = {
    "device": "{}",
    "dtype": "{}",
    "prompt": "prompt of {} tokens",
    "new_tokens": "{} new tokens",
    "batch": "batch {}",
    "rounds": "{} rounds",
}
CONDITIONS = {"ratio": {}, "weight_bytes": {}, "perplexity": QUALITY}  # of any other number: SPEED
Row = Mapping[str, Any]


def share(value: float | None) -> str:
    """0.8 as `80.0%`, with more digits close to 1, where rounding would claim that nothing is lost."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{math.floor(value * 1e4) / 1e2:.2f}%" if 0.9995 <= value < 1 else f"{value:.1%}"


def loss(value: float | None) -> str:
    """A predicted loss, which may be tiny."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.2e}" if value else "0"


def show(key: str, row: Row, rows: Sequence[Row]) -> str:
    """A row's number with its unit; bytes in the unit of the largest of all rows."""
    value = row.get(key)
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not finite"
    if key == "ratio":
        return share(value)
    if key.endswith("_bytes"):
        largest = max(other.get(key) or 0 for other in rows)
        return f"{value / 1e9:.2f} GB" if largest >= 1e9 else f"{value / 1e6:.1f} MB"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2
    return f"{value:,.{digits}f}" + (" ms" if "_ms_" in key else "")


def change(key: str, row: Row, rows: Sequence[Row]) -> str:
    """Relative change against the first row, or nothing where there is none to state."""
    value, base = row.get(key), rows[0].get(key)
    if row is rows[0] or value is None or not base or not math.isfinite(value / base):
        return ""
    return f"{value / base - 1:+.1%}".replace("-", "−")


def name_of(row: Row) -> str:
    return row.get("name") or "unnamed"


def setting(rows: Sequence[Row], *keys: str) -> str:
    """How the rows that have any of the numbers were measured; differences are spelled out."""
    conditions = CONDITIONS.get(keys[0], SPEED)
    found = []
    for row in rows:
        if conditions and any(row.get(key) is not None for key in keys):
            parts = [form.format(row[key]) for key, form in conditions.items() if row.get(key) is not None]
            found.append((name_of(row), ", ".join(parts)))
    if len({text for _, text in found}) > 1:
        return "settings differ: " + "; ".join(f"{name}: {text or 'not stated'}" for name, text in found)
    return "" if not found else f"measured on {found[0][1]}" if found[0][1] else "settings not stated"
