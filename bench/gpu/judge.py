"""What the figures of a line come to: its goals, and one line for a person."""

from typing import Any

from bench.gpu.lines import beside, told
from bench.gpu.work import Goal

LESS = ("microseconds", "seconds", "memory", "error")  # figures that are to be small


def judged(goal: Goal, row: dict[str, Any]) -> dict[str, Any]:
    """A goal with the figure that was reached, None where that was not measured.

    Peers are named by how they begin; the best peer counts, and nothing does if one of them would not run.
    """
    found = {"figure": goal.figure, "peer": goal.peer, "goal": goal.at}
    reached = compared(goal, row) if goal.figure in ("speedup", "memory") else {"reached": figure(goal, row)}
    value = reached["reached"]
    met = value is not None and (value <= goal.at if goal.figure in LESS else value >= goal.at)
    return found | reached | {"met": met}


def figure(goal: Goal, row: dict[str, Any]) -> float | None:
    """One that needs no peer."""
    ours = row["seconds"]["ours"]["p50"]
    figures = {"microseconds": ours * 1e6, "seconds": ours, "rate": row.get("rate")}
    return {**figures, "bandwidth": row["bandwidth"], "error": row["error"]}[goal.figure]


def compared(goal: Goal, row: dict[str, Any]) -> dict[str, Any]:
    """One against a peer; for a speed-up also from its p20 over our p80 to its p80 over our p20."""
    values = row["speedup"] if goal.figure == "speedup" else memory(row["extra_bytes"])
    named = [name for name in values if name.startswith(goal.peer)]
    if not named or any(name.startswith(goal.peer) for name in row.get("broken_peers", {})):
        return {"reached": None}
    best = (max if goal.figure in LESS else min)(named, key=values.__getitem__)
    if goal.figure == "memory":
        return {"reached": values[best]}
    ours, its = row["seconds"]["ours"], row["seconds"][best]
    return {"reached": values[best], "spread": [its["p20"] / ours["p80"], its["p80"] / ours["p20"]]}


def memory(extra: dict[str, int]) -> dict[str, float]:
    """What ours takes beside its inputs as a multiple of what each peer takes; of calls too long for it nothing."""
    return {name: extra["ours"] / max(1, each) for name, each in extra.items()} if "ours" in extra else {}


def line(row: dict[str, Any]) -> str:
    """One line for a person."""
    head = f"{row['id']:4} {row['name'][:52]:52}"
    if "seconds" not in row:
        return f"{head} {row.get('failed') or row.get('left_out')}"
    ours = row["seconds"]["ours"]["p50"] * 1e6
    missed = [told(goal) for goal in row["goals"] if not goal["met"]]
    verdict = "missed: " + ", ".join(missed) if missed else "met" if row["goals"] else ""
    shares = f"{100 * row['bandwidth']:3.0f} % bw  {100 * row['compute']:3.0f} % flops"
    rate = f"{row['rate']:.0f} tokens/s  " if "rate" in row else ""
    warm = ", warm" if row.get("warm") else ""
    return f"{head} {ours:10.2f} us{warm}  {rate}{shares}  {'  '.join(beside(row))}  {verdict}"
