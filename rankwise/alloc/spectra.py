"""One block at several widths of its MLP: what each loses, what its layers' spectra are then, and carrying one out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rankwise.alloc.budget import Choices
from rankwise.alloc.channels import Channels, among
from rankwise.alloc.curvature import Curvature
from rankwise.alloc.factors import definite, spectrum
from rankwise.alloc.mlps import Mlp
from rankwise.alloc.removal import removal_order, without
from rankwise.anatomy import features, weight_of
from rankwise.files import open_tensors, write_tensors

# Layer, its (out, in) and energies `[r]` at some width, to what it may become then.
Chooser = Callable[[str, tuple[int, int], np.ndarray], Choices]


@dataclass(frozen=True)
class Option:
    """One width of a block.

    Args:
        lost: channels taken out.
        loss: predicted for that alone, in the units of the layers' losses.
        layers: the choices of the block's layers then.
    """

    lost: int
    loss: float
    layers: list[Choices]


@dataclass(frozen=True)
class Block:
    """A block, and where what is known of its widths lies.

    Args:
        index: which.
        linears: name to layer.
        mlp: its layers that share channels, or None.
        counts: how many channels may go, 0 first.
        path: a safetensors file: `order` and `losses` of the channels, and spectra `NAME.LOST`.
    """

    index: int
    linears: dict[str, nn.Module]
    mlp: Mlp | None
    counts: list[int]
    path: Path

    @torch.no_grad()
    def measure(self, curvature: Curvature, device: torch.device, *, planned: bool) -> None:
        """Write the file, without spectra if the width is `planned`."""
        c, f = curvature.metric(self.index)
        mlp, shared = self.mlp, () if self.mlp is None else (*self.mlp.writers, self.mlp.reader)
        known = {name: bool(c[name].any() and f[name].any()) for name in self.linears}
        wanted = [name for name in self.linears if not planned or name in shared]
        weights = {name: weight_of(self.linears[name]).detach().to(device) for name in wanted}
        metric = {name: (definite(c[name].to(device)), definite(f[name].to(device))) for name in wanted}
        found: dict[str, torch.Tensor] = {}
        if mlp is not None and len(self.counts) > 1 and all(known[name] for name in shared):
            reader = weights[mlp.reader], *metric[mlp.reader]
            found["order"], found["losses"] = removal_order(*reader, self.counts[-1])
        for name, w in () if planned else weights.items():  # infinite where the text never reached the layer
            endless = torch.full((min(w.shape),), torch.inf, dtype=torch.float64)
            found[f"{name}.0"] = spectrum(w, *metric[name]) if known[name] else endless
        for lost in self.counts[1:] if "order" in found and not planned else ():
            found |= self._narrower(lost, found["order"], weights, metric)
        write_tensors(self.path, {name: tensor.cpu() for name, tensor in found.items()}, {})

    def _narrower(
        self,
        lost: int,
        order: torch.Tensor,
        weights: dict[str, torch.Tensor],
        metric: dict[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """Spectra of the layers that lose channels."""
        assert self.mlp is not None
        reader, (inputs, outputs) = self.mlp.reader, metric[self.mlp.reader]
        kept = kept_of(order, lost, len(inputs))
        new = without(weights[reader], inputs, kept)
        found = {f"{reader}.{lost}": spectrum(new, among(inputs, kept), outputs)}
        for name in self.mlp.writers:
            inputs, outputs = metric[name]
            found[f"{name}.{lost}"] = spectrum(weights[name][kept], inputs, among(outputs, kept))
        return found

    def options(self, choose: Chooser, removal: float) -> list[Option]:
        """The widths at which every layer may become something, and what; all channels in any case.

        Args:
            choose: what a layer may become.
            removal: what a nat counts in the units of its losses.
        """
        with open_tensors(self.path) as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        losses = found.get("losses", torch.zeros(1, dtype=torch.float64))
        options = [
            Option(lost, removal * float(losses[lost]), [self._choices(n, lost, found, choose) for n in self.linears])
            for lost in self.counts
            if lost < len(losses)
        ]
        return [option for option in options if not option.lost or all(entry.kind for entry in option.layers)]

    def _choices(self, name: str, lost: int, found: dict[str, torch.Tensor], choose: Chooser) -> Choices:
        m, n = features(self.linears[name])
        if self.mlp is not None:
            m, n = m - lost * (name in self.mlp.writers), n - lost * (name == self.mlp.reader)
        return choose(name, (m, n), found.get(f"{name}.{lost}", found[f"{name}.0"]).numpy())

    def carry_out(self, channels: Channels, lost: int, curvature: Curvature, device: torch.device) -> None:
        """Write what is left of the block without so many channels."""
        if self.mlp is None or not lost:
            channels.write(self.index, None, torch.empty(0), torch.empty(0), 0.0)
            return
        with open_tensors(self.path) as file:
            order, losses = file.get_tensor("order").to(device), file.get_tensor("losses")
        weight = weight_of(self.linears[self.mlp.reader]).detach().to(device)
        kept = kept_of(order, lost, weight.shape[1])
        new = without(weight, definite(curvature.metric_inputs(self.index)[self.mlp.reader].to(device)), kept)
        channels.write(self.index, self.mlp, kept, new, float(losses[lost]))


def kept_of(order: torch.Tensor, lost: int, channels: int) -> torch.Tensor:
    """The channels that stay, rising, when the first `lost` of an order go."""
    stays = torch.ones(channels, dtype=torch.bool, device=order.device)
    stays[order[:lost]] = False
    return stays.nonzero()[:, 0]
