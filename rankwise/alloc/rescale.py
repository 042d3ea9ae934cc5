"""From wishes to a budget: scale what every layer asks for by one factor until the whole costs what it may."""

import math

import numpy as np

from rankwise.alloc.budget import Choices, cost_of
from rankwise.errors import RankwiseError

HALVINGS = 60  # of the factor's range: as fine as a float
LEAST = 1e-6  # a share below this part of the largest counts as that much, so that every layer can be reached


def proportional(choices: dict[str, Choices], shares: dict[str, float], target: float) -> dict[str, int]:
    """Give every layer the parameter ratio `f · shares[layer]`, with one f for all that meets the budget.

    A layer gets its largest choice within its ratio, and stops at the largest that it has (dense, where that is
    allowed). Where even smallest choices are above their ratios, f is lowered until the budget holds. What rounding
    down leaves over buys at most one step a layer, in rising order of what a layer has for what it asked.

    Args:
        choices: layer to what it may become.
        shares: layer to what it asks for, finite and not negative; only the proportions count.
        target: parameters; at least the sum of the smallest choices.

    Returns:
        Layer to the index of its choice; total cost at most `target`.

    Raises:
        RankwiseError: a share is missing, negative, NaN or Inf, or all are zero.
    """
    wanted = _checked(choices, shares)
    picked = _at_level(choices, wanted, target)
    left = target - cost_of(choices, picked)

    def served(name: str) -> float:
        return float(choices[name].cost[picked[name]] / choices[name].dense_cost) / wanted[name]

    for name in sorted(choices, key=served):
        cost, at = choices[name].cost, picked[name]
        if at + 1 < len(cost) and (step := int(cost[at + 1] - cost[at])) <= left:
            picked[name] = at + 1
            left -= step
    return picked


def within(entry: Choices, ratio: float) -> int:
    """Index of a layer's largest choice that keeps at most `ratio` of its parameters; its smallest if none does."""
    return max(0, int(np.searchsorted(entry.cost, ratio * entry.dense_cost, side="right")) - 1)


def _checked(choices: dict[str, Choices], shares: dict[str, float]) -> dict[str, float]:
    """The shares of these layers, none below `LEAST` of the largest."""
    for name in choices:
        value = shares.get(name)
        if value is None or not math.isfinite(value) or value < 0:
            raise RankwiseError(f"share of {name}", value, "allowed: a finite number from 0")
    largest = max((float(shares[name]) for name in choices), default=1.0)
    if largest == 0:
        raise RankwiseError("shares", 0.0, "at least one above 0 is needed")
    return {name: max(float(shares[name]) / largest, LEAST) for name in choices}


def _at_level(choices: dict[str, Choices], wanted: dict[str, float], target: float) -> dict[str, int]:
    """Every layer's largest choice within its ratio, at the largest factor whose selection fits the target."""

    def at(factor: float) -> dict[str, int]:
        return {name: within(entry, factor * wanted[name]) for name, entry in choices.items()}

    asked = {name: share * choices[name].dense_cost for name, share in wanted.items()}
    low, high = 0.0, level(asked, {name: float(entry.cost[-1]) for name, entry in choices.items()}, target)
    if cost_of(choices, at(high)) <= target:
        return at(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_of(choices, at(middle)) <= target else (low, middle)
    return at(low)


def level(weights: dict[str, float], caps: dict[str, float], total: float) -> float:
    """The f of `Σ min(f · weight, cap) = total`; one at which all are at their caps if those sum to less.

    Args:
        weights: above 0.
        caps: above 0, under the same names.
        total: what is shared out, in the caps' unit.
    """
    free, left = dict(weights), total
    while free:
        factor = left / sum(free.values())
        full = [name for name, weight in free.items() if factor * weight > caps[name]]
        if not full:
            return factor
        for name in full:
            left -= caps[name]
            del free[name]
    return 2 * max((caps[name] / weight for name, weight in weights.items()), default=0.0)
