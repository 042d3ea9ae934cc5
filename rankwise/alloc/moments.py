"""Sums of outer products, gathered by hooks while a block runs. fp32 accumulation whatever the model's dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankwise.alloc.exchange import sum_to_main
from rankwise.anatomy import features
from rankwise.distributed import gather, world
from rankwise.errors import RankwiseError

MAGNITUDES = "magnitudes."  # before a leader's name, in the inputs' files


class _Sums:
    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.sums: dict[str, torch.Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks are on the layers while the context lasts."""
        handles = [self._attach(name, module) for name, module in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, name: str, module: nn.Module) -> Any:
        raise NotImplementedError

    def _add(self, name: str, rows: torch.Tensor) -> None:
        """Add `Σ r rᵀ` over the last dimension of `rows [..., n]`."""
        flat = rows.detach().reshape(-1, rows.shape[-1]).float()
        if name not in self.sums:
            self.sums[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
        self.sums[name].addmm_(flat.T, flat)

    def merge(self, device: torch.device) -> None:
        """Add up what all processes have summed, in the main one; `device` is where their sums are."""
        self._merge(self.sums, device)

    def _merge(self, sums: dict[str, torch.Tensor], device: torch.device) -> None:
        """A layer that was reached in some processes counts as zero in the others."""
        shapes = {name: shape for part in gather({n: t.shape for n, t in sums.items()}) for name, shape in part.items()}
        for name, shape in shapes.items() if world() > 1 else ():
            if name not in sums:
                sums[name] = torch.zeros(shape, device=device)
            sum_to_main(sums[name])

    def _means(self, tokens: int, what: str) -> dict[str, torch.Tensor]:
        for name, total in self.sums.items():
            if not torch.isfinite(total.diagonal()).all():  # no entry is larger than the larger of two on the diagonal
                raise RankwiseError(name, f"NaN or Inf in its {what}", "try --dtype fp32 or bf16")
        return {name: total.div_(tokens) for name, total in self.sums.items()}


class InputSums(_Sums):
    """`Σ x xᵀ` and `Σ |x|` per layer; layers that are handed the same tensor (q, k, v; gate, up) share one sum.

    Args:
        layers: name to module, of one block.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__(layers)
        self.sizes: dict[str, torch.Tensor] = {}
        self.leaders: dict[str, str] = {}
        self._seen: dict[tuple[int, int], tuple[torch.Tensor, str]] = {}

    def start_window(self) -> None:
        """Call before each forward: tensors of the last one are forgotten."""
        self._seen = {}

    def _attach(self, name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            key = (id(x), x._version)  # the same object, not written to in between; the entry keeps it alive
            _, leader = self._seen.setdefault(key, (x, name))
            self.leaders[name] = leader
            if leader == name:
                self._add(name, x)
                size = x.detach().reshape(-1, x.shape[-1]).float().abs().sum(0)
                self.sizes[name] = self.sizes[name] + size if name in self.sizes else size

        return module.register_forward_pre_hook(hook)

    def merge(self, device: torch.device) -> None:
        """Add up what all processes have summed, in the main one; `device` is where their sums are."""
        self.leaders = {name: leader for part in gather(self.leaders) for name, leader in part.items()}
        self._merge(self.sums, device)
        self._merge(self.sizes, device)

    def finish(self, tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Leader to mean `[n, n]`, and layer to leader. A layer that was never called has a zero matrix."""
        for name, module in self.layers.items():
            if name not in self.leaders:
                n = features(module)[1]
                self.leaders[name], self.sums[name] = name, torch.zeros(n, n)
        return self._means(tokens, "input activations"), self.leaders

    def magnitudes(self, tokens: int) -> dict[str, torch.Tensor]:
        """Leader to mean |x| `[n]`; call after `finish`. Zeros for a layer that was never called."""
        zeros = {name: total.new_zeros(len(total)) for name, total in self.sums.items()}
        return {name: self.sizes.get(name, zero) / tokens for name, zero in zeros.items()}


class GradientSums(_Sums):
    """`Σ g gᵀ` per layer, g the gradient at its output."""

    def _attach(self, name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda grad: self._add(name, grad))

        return module.register_forward_hook(hook)

    def finish(self, tokens: int) -> dict[str, torch.Tensor]:
        """Layer to mean `[m, m]`. A layer that no gradient reached has a zero matrix."""
        for name, module in self.layers.items():
            m = features(module)[0]
            self.sums.setdefault(name, torch.zeros(m, m))
        return self._means(tokens, "output gradients")
