"""From learnt shares to a selection that meets the budget."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rankwise.alloc.budget import Choices, cost_of

Spend = Callable[[dict[str, Choices], float], dict[str, int]]
WHOLE = 0.99  # a layer that learnt to keep this share stays as it was (ARA, finalisation)
WINDOW = 20  # the slope of a layer's losses is taken over this part of its choices, on either side


@dataclass(frozen=True)
class Ordered(Choices):
    """Choices that keep the dearest components, whichever those are.

    Args:
        order: `[r]` components, the dearest first; rank k keeps the first k of them.
    """

    order: np.ndarray

    def kept(self, at: int) -> tuple[int, ...] | None:
        """Rising numbers of the components that choice `at` keeps; None if they are the first ones, or all."""
        if self.kind[at] == "dense":
            return None
        found = np.sort(self.order[: self.rank[at]])
        return None if found[-1] == len(found) - 1 else tuple(int(i) for i in found)


def learnt_choices(choices: dict[str, Choices], shares: dict[str, float]) -> dict[str, Choices]:
    """Scale each layer's predicted losses so that at its learnt share every layer loses the same per parameter.

    That is what a trained allocation says: were a parameter worth more in one layer than in another, training would
    have moved it there. The unit is the loss of one parameter; a Lagrangian fill at multiplier 1 gives the learnt
    shares back where losses are convex.

    Args:
        choices: layer to what it may become, with predicted losses.
        shares: layer to the share of its parameters that training left it.
    """
    return {name: replace(entry, loss=entry.loss * _scale(entry, shares[name])) for name, entry in choices.items()}


def settle(choices: dict[str, Choices], shares: dict[str, float], target: float, spend: Spend) -> dict[str, int]:
    """Meet a budget with ARA's exception: layers that learnt to be dense stay so, the others share what is left.

    Where the dense ones leave too little for the others, all take part.

    Args:
        choices: layer to what it may become.
        shares: layer to its learnt share.
        target: parameters.
        spend: selects among some layers' choices under a budget.

    Returns:
        Layer to the index of its choice; total cost at most `target`.
    """
    whole = {
        name: len(entry.kind) - 1
        for name, entry in choices.items()
        if shares[name] >= WHOLE and entry.kind[-1] == "dense"
    }
    others = {name: entry for name, entry in choices.items() if name not in whole}
    left = target - cost_of(choices, whole)
    if left < sum(int(entry.cost[0]) for entry in others.values()):
        return spend(choices, target)
    picked = whole | (spend(others, left) if others else {})
    return {name: picked[name] for name in choices}


def _scale(entry: Choices, share: float) -> float:
    """1 over the loss per parameter around a share; 1 where the losses there are level."""
    if len(entry.cost) < 2:
        return 1.0
    at = int(np.argmin(np.abs(entry.cost - share * entry.dense_cost)))
    half = max(1, len(entry.cost) // WINDOW)
    low, high = max(0, at - half), min(len(entry.cost) - 1, at + half)
    slope = (entry.loss[low] - entry.loss[high]) / (entry.cost[high] - entry.cost[low])
    return float(1 / slope) if slope > 0 else 1.0
