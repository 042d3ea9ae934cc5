"""Sums of outer products, gathered by hooks while a block runs. fp32 accumulation whatever the model's dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import one_hot

from rankwise.alloc.exchange import sum_to_main
from rankwise.anatomy import features
from rankwise.distributed import gather, world
from rankwise.errors import RankwiseError

MAGNITUDES = "magnitudes."  # before a leader's name, in the inputs' files
WEIGHTED = "weighted."  # before a layer's name, in the outputs' files
EMPHASIS = "emphasis."  # likewise
OCTAVES = 32  # of positions in a window: 0, 1 to 2, 3 to 6, ...
TINY = 1e-30  # under what is divided by
NOISE = 1e-5  # of a window's largest gradient: what is less has no direction


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

    def _add(self, sums: dict[str, torch.Tensor], name: str, rows: torch.Tensor) -> None:
        """Add `Σ r rᵀ` over the last dimension of `rows [..., n]`."""
        flat = rows.detach().reshape(-1, rows.shape[-1]).float()
        if name not in sums:
            sums[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
        sums[name].addmm_(flat.T, flat)

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
                self._add(self.sums, name, x)
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
        for name, total in self.sums.items():
            _require_finite(name, "input activations", total.diagonal())
        return {name: total.div_(tokens) for name, total in self.sums.items()}, self.leaders

    def magnitudes(self, tokens: int) -> dict[str, torch.Tensor]:
        """Leader to mean |x| `[n]`; call after `finish`. Zeros for a layer that was never called."""
        zeros = {name: total.new_zeros(len(total)) for name, total in self.sums.items()}
        return {name: self.sizes.get(name, zero) / tokens for name, zero in zeros.items()}


class GradientSums(_Sums):
    """What the gradients g at the layers' outputs say of each token's outputs and inputs.

    A token's share of the Fisher matrix is `g gᵀ ⊗ x xᵀ`. With `g = ‖g‖ ĝ` the sum over tokens is taken to be
    `E[ĝ ĝᵀ] ⊗ E[‖g‖² x xᵀ]`: how much a token matters goes with its input, where it matters does not. The first token
    of a sequence, which most heads attend to, has nearly all of `E‖g‖²` at the values' projection: in `E[g gᵀ]` it
    would hide all others, and in `E[x xᵀ]` it would not be seen.

    By octaves of the position `Σ ‖g‖²` is kept, too, for text whose gradients are not known. Positions are rows: of a
    layer that some tokens do not reach it says nothing.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__(layers)
        self.weighted: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def _attach(self, name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            if out.requires_grad:
                x = args[0].detach().clone()  # it may be written to before the gradient comes
                out.register_hook(lambda grad: self._take(name, x, grad))

        return module.register_forward_hook(hook)

    def _take(self, name: str, x: torch.Tensor, grad: torch.Tensor) -> None:
        g = grad.detach().reshape(-1, grad.shape[-1]).float()
        x = x.reshape(-1, x.shape[-1]).float()
        sizes = g.norm(dim=1, keepdim=True)
        heard = sizes > NOISE * sizes.amax()
        self._add(self.sums, name, torch.where(heard, g / sizes.clamp_min(TINY), 0))
        self._add(self.weighted, name, x * sizes)
        seen = torch.cat([sizes, torch.ones_like(sizes)], 1).square()
        total = one_hot(octaves(len(g), g.device), OCTAVES).to(seen).T @ seen  # the same bits every time
        self.weights[name] = self.weights[name] + total if name in self.weights else total

    def merge(self, device: torch.device) -> None:
        """Add up what all processes have summed, in the main one; `device` is where their sums are."""
        for sums in (self.sums, self.weighted, self.weights):
            self._merge(sums, device)

    def finish(self, tokens: int) -> dict[str, torch.Tensor]:
        """Layer to F `[m, m]`, `E‖g‖² E[ĝ ĝᵀ]`; zero for a layer that no gradient reached.

        Under `WEIGHTED` and its name is `E[‖g‖² x xᵀ] / E‖g‖²` `[n, n]`, under `EMPHASIS` and its name an octave's mean
        of ‖g‖² over that of all tokens `[OCTAVES]`. Means are over the tokens that reach the layer; `WEIGHTED` is times
        their share of all, as the mean of `x xᵀ` is.
        """
        found: dict[str, torch.Tensor] = {}
        for name, module in self.layers.items():
            m, n = features(module)
            seen = self.weights.get(name, torch.zeros(OCTAVES, 2))
            weight, count = seen.double().sum(0)
            outputs, inputs = self.sums.get(name, torch.zeros(m, m)), self.weighted.get(name, torch.zeros(n, n))
            _require_finite(name, "output gradients", weight, inputs.diagonal(), outputs.diagonal())
            found[name] = outputs.mul_(float(weight / count.clamp_min(1) ** 2))
            found[WEIGHTED + name] = inputs.mul_(float(count / tokens / weight.clamp_min(TINY)))
            found[EMPHASIS + name] = _relative(seen)
        return found


def _require_finite(name: str, what: str, *parts: torch.Tensor) -> None:
    """Of a moment the diagonal will do: no entry is larger than the larger of two on it."""
    if not all(torch.isfinite(part).all() for part in parts):
        raise RankwiseError(name, f"NaN or Inf in its {what}", "try --dtype fp32 or bf16")


def octaves(count: int, device: torch.device) -> torch.Tensor:
    """`[count]` the octave of each position: that of p is `⌊log2(p + 1)⌋`."""
    exponents: torch.Tensor = torch.frexp(torch.arange(1.0, count + 1, dtype=torch.float64, device=device)).exponent
    return exponents.long() - 1


def _relative(seen: torch.Tensor) -> torch.Tensor:
    """An octave's mean over the mean of all, from `[OCTAVES, 2]` sums and counts; ones where nothing was summed.

    Octaves beyond the text are like the last one.
    """
    total, count = seen.double().sum(0)
    if not total:
        return torch.ones(len(seen))
    sums, counts = seen[seen[:, 1] > 0].double().unbind(1)
    means = sums / counts
    return torch.cat([means, means[-1:].expand(len(seen) - len(means))]).div(total / count).float()
