"""ARS's hypernetwork (Gao et al., NAACL 2024): a bidirectional GRU writes the logits of every layer's mask.

Each layer has a fixed random sequence, one vector a component, and a linear head of its own; the GRU and the norm
are shared by all layers, which then run as one batch a size.
"""

import torch
from torch import nn

from rankwise.alloc.gumbel import draw_gumbel, keep_probability
from rankwise.alloc.masks import Drawn

INPUT, HIDDEN = 32, 64
OFFSET = 3.0  # of the logits: at the start nearly every component is kept


class HyperNet(nn.Module):
    """`logits = Linear(GELU(LayerNorm(BiGRU(z)))) + 3` for every layer; a `Bank` to the training loop.

    Args:
        sizes: layer to its number of components.
        seed: fixes the sequences z and the first weights.
        temperature: of the soft masks (0.4 in the authors' code).
        any_k: see `masks.draw_gumbel`.
    """

    def __init__(self, sizes: dict[str, int], seed: int, *, temperature: float = 0.4, any_k: bool = True) -> None:
        super().__init__()
        self.sizes, self.temperature, self.any_k = dict(sizes), temperature, any_k
        self.names = list(sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gru = nn.GRU(INPUT, HIDDEN, batch_first=True, bidirectional=True)
            self.norm = nn.LayerNorm(2 * HIDDEN)
            self.heads = nn.ModuleList(nn.Linear(2 * HIDDEN, 1) for _ in sizes)
            self.groups = {size: [n for n in sizes if sizes[n] == size] for size in sorted(set(sizes.values()))}
            for size, names in self.groups.items():
                self.register_buffer(f"z{size}", torch.randn(len(names), size, INPUT), persistent=False)

    def logits(self) -> dict[str, torch.Tensor]:
        """Layer to `[size]` logits."""
        heads = dict(zip(self.names, self.heads, strict=True))
        found: dict[str, torch.Tensor] = {}
        for size, names in self.groups.items():
            states = nn.functional.gelu(self.norm(self.gru(self.get_buffer(f"z{size}"))[0]))
            found |= {name: heads[name](state)[:, 0] + OFFSET for name, state in zip(names, states, strict=True)}
        return {name: found[name] for name in self.names}

    def draw(self, noise: torch.Generator) -> dict[str, Drawn]:
        """Every layer's mask in one step."""
        return {
            name: draw_gumbel(logits, self.temperature, noise, any_k=self.any_k)
            for name, logits in self.logits().items()
        }

    @torch.no_grad()
    def importances(self) -> dict[str, torch.Tensor]:
        """Layer to `[size]` probability that a component is kept."""
        return {name: keep_probability(logits) for name, logits in self.logits().items()}

    @torch.no_grad()
    def ranks(self) -> dict[str, float]:
        """Layer to the number of components kept on average."""
        return {name: float(kept.sum()) for name, kept in self.importances().items()}
