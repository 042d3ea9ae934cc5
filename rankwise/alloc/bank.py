"""All layers' masks together: what one training trains."""

from typing import Any, Protocol

import torch
from torch import nn

from rankwise.alloc.masks import Drawn


class Mask(Protocol):
    """What a parametrisation of one layer's mask answers."""

    size: int

    def draw(self, noise: torch.Generator) -> Drawn:
        """This step's mask."""
        ...

    def importance(self) -> torch.Tensor:
        """`[size]` soft importance of each component, without noise or gradient."""
        ...

    def rank(self) -> float:
        """Components that the parameters stand for now."""
        ...


class Bank(nn.Module):
    """One mask a layer, each with parameters of its own.

    Args:
        masks: layer name to its mask.
    """

    def __init__(self, masks: dict[str, Any]) -> None:
        super().__init__()
        self.names = list(masks)
        self.masks = nn.ModuleList(masks.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Components of each layer's factors that are needed."""
        return {name: mask.size for name, mask in self._items()}

    def draw(self, noise: torch.Generator) -> dict[str, Drawn]:
        """Every layer's mask in one step."""
        return {name: mask.draw(noise) for name, mask in self._items()}

    @torch.no_grad()
    def importances(self) -> dict[str, torch.Tensor]:
        """Layer to `[size]` importance."""
        return {name: mask.importance() for name, mask in self._items()}

    @torch.no_grad()
    def ranks(self) -> dict[str, float]:
        """Layer to the rank that its mask stands for now, not rounded."""
        return {name: mask.rank() for name, mask in self._items()}

    def _items(self) -> list[tuple[str, Any]]:
        return list(zip(self.names, self.masks, strict=True))
