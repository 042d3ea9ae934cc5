"""How many channels every MLP keeps: against ranks, under one Lagrange multiplier.

For a few widths of each MLP the spectra of its layers are worked out as they would be without the channels that cost
least (`alloc.removal`). A block then has one curve of loss against parameters for each width, and the multiplier that
meets the budget picks width and ranks together. The ranks are chosen once more, exactly, when the factors are there.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rankwise.alloc.budget import Choices
from rankwise.alloc.channels import Channels
from rankwise.alloc.curvature import Curvature
from rankwise.alloc.factors import definite, spectrum
from rankwise.alloc.methods.base import LEAST, Method
from rankwise.alloc.mlps import Mlp, find_mlp
from rankwise.alloc.removal import removal_order, without
from rankwise.alloc.stream import BlockStream
from rankwise.anatomy import block_linears, features, weight_of
from rankwise.distributed import barrier, is_main
from rankwise.errors import RankwiseError
from rankwise.files import open_tensors, write_tensors
from rankwise.jobs import claim
from rankwise.progress import Track, silent

WIDTHS = 13  # of an MLP that are looked at, all channels included


@dataclass(frozen=True)
class _Option:
    """One width of a block.

    Args:
        lost: channels taken out.
        loss: predicted, of that alone.
        layers: the choices of the block's layers then.
    """

    lost: int
    loss: float
    layers: list[Choices]


def choose_channels(
    model: Any,
    curvature: Curvature,
    method: Method,
    window: torch.Tensor,
    folder: Path,
    *,
    device: torch.device,
    planned: Mapping[str, int] | None = None,
    track: Track = silent,
) -> Channels:
    """Choose widths for a method's budget of parameters, or finish or reuse what `folder` holds of that.

    Args:
        model: dense, in host memory.
        curvature: two-sided.
        method: its ratio, kinds and multiples.
        window: `[1, T]` token ids, to see how layers hang together.
        folder: for a folder of channels, and one of spectra, which no ratio changes; names say what decides them.
        device: where it computes.
        planned: layer that reads channels to how many it keeps, where that is decided; other blocks keep all.
        track: progress.

    Raises:
        RankwiseError: a planned layer is none that reads channels.
    """
    linears = block_linears(model)
    originals = [{name: features(m) for name, m in block.items()} for block in linears]
    asked = {"options": method.options(), "planned": planned}
    channels = Channels(folder / f"channels-{digest(asked)}", originals, asked | curvature.identity)
    if is_main():
        claim(channels.folder, "channels", channels.identity)
    if is_main() and not all(channels.file(index).exists() for index in range(len(linears))):
        mlps = _find(model, linears, window, device)
        counts = [_counts(mlp, block, method, planned) for mlp, block in zip(mlps, linears, strict=True)]
        spectra = folder / f"spectra-{digest(counts)}"
        claim(spectra, "spectra", {"lost": counts, **curvature.identity})
        paths = [spectra / f"spectra_{index:03d}.safetensors" for index in range(len(linears))]
        parts = list(zip(linears, mlps, counts, paths, strict=True))
        chosen = [_Option(0, 0.0, [])] * len(linears)
        if any(map(any, counts)):
            with track("channels", len(linears)) as advance:
                for index, (block, mlp, lost, path) in enumerate(parts):
                    if not path.exists():
                        write_tensors(path, _measure(block, mlp, lost, curvature, index, device), {})
                    advance()
            options = [_options(path, block, mlp, lost, method) for block, mlp, lost, path in parts]
            total = sum(m * n for block in originals for m, n in block.values())
            chosen = _pick(options, method.ratio * total) if planned is None else [some[-1] for some in options]
        for index, (option, (block, mlp, _, path)) in enumerate(zip(chosen, parts, strict=True)):
            _carry_out(channels, index, block, mlp, option, curvature, path, device)
    barrier()
    return channels


def widths(mlp: Mlp, block: dict[str, nn.Module], method: Method) -> list[int]:
    """How many channels may be taken out of an MLP, 0 first; what stays is a multiple of the method's."""
    channels, multiple = features(block[mlp.reader])[1], method.width_multiple
    if any(map(method.pins, (*mlp.writers, mlp.reader))):
        return [0]
    lost = [channels - left for left in range(multiple, channels, multiple) if left >= LEAST * channels][::-1]
    few = min(len(lost), WIDTHS - 1)
    return [0, *(lost[round(at * (len(lost) - 1) / max(1, few - 1))] for at in range(few))]


def _counts(
    mlp: Mlp | None, block: dict[str, nn.Module], method: Method, planned: Mapping[str, int] | None
) -> list[int]:
    if planned is None:
        return [0] if mlp is None else widths(mlp, block, method)
    for name in planned.keys() & block.keys():
        if mlp is None or mlp.reader != name:
            raise RankwiseError(f"{name}.in_features", planned[name], "this layer keeps all of its inputs")
    if mlp is None or mlp.reader not in planned:
        return [0]
    return [0, features(block[mlp.reader])[1] - planned[mlp.reader]]


def _find(
    model: Any, linears: list[dict[str, nn.Module]], window: torch.Tensor, device: torch.device
) -> list[Mlp | None]:
    stream = BlockStream(model, device, window)
    try:
        hidden, found = stream.embed(window).to(device), []
        for index, block in enumerate(linears):
            with stream.on_device(index):
                found.append(find_mlp(stream, index, block, hidden))
        return found
    finally:
        stream.close()


@torch.no_grad()
def _measure(
    block: dict[str, nn.Module],
    mlp: Mlp | None,
    counts: list[int],
    curvature: Curvature,
    index: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Order and losses of a block's channels, and the spectra `NAME.LOST` of its layers."""
    c, f = curvature.metric(index)
    weights = {name: weight_of(linear).detach().to(device) for name, linear in block.items()}
    metric = {name: (definite(c[name].to(device)), definite(f[name].to(device))) for name in block}
    known = {name: bool(c[name].any() and f[name].any()) for name in block}
    found = {f"{n}.0": _spectrum(w, *metric[n], known[n]) for n, w in weights.items()}
    if mlp is None or len(counts) == 1 or not all(known[name] for name in (*mlp.writers, mlp.reader)):
        return {name: tensor.cpu() for name, tensor in found.items()}
    inputs, outputs = metric[mlp.reader]
    found["order"], found["losses"] = removal_order(weights[mlp.reader], inputs, outputs, counts[-1])
    for lost in counts[1:]:
        kept = _kept(found["order"], lost, len(inputs))
        new = without(weights[mlp.reader], inputs, kept)
        found[f"{mlp.reader}.{lost}"] = spectrum(new, inputs[kept][:, kept], outputs)
        for name in mlp.writers:
            found[f"{name}.{lost}"] = spectrum(weights[name][kept], metric[name][0], metric[name][1][kept][:, kept])
    return {name: tensor.cpu() for name, tensor in found.items()}


def _spectrum(weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor, known: bool) -> torch.Tensor:
    """As of factors: infinite where the calibration never reached the layer."""
    return spectrum(weight, inputs, outputs) if known else weight.new_full((min(weight.shape),), torch.inf).double()


def _kept(order: torch.Tensor, lost: int, channels: int) -> torch.Tensor:
    stays = torch.ones(channels, dtype=torch.bool, device=order.device)
    stays[order[:lost]] = False
    return stays.nonzero()[:, 0]


def _options(
    path: Path, block: dict[str, nn.Module], mlp: Mlp | None, counts: list[int], method: Method
) -> list[_Option]:
    with open_tensors(path) as file:
        keys = set(file.keys())
        counts = counts if "losses" in keys else [0]
        losses = file.get_tensor("losses") if "losses" in keys else torch.zeros(1)
        energies = {key: file.get_tensor(key).numpy() for key in keys - {"order", "losses"}}

    def layer(name: str, lost: int) -> Choices:
        m, n = features(block[name])
        m, n = m - lost * (mlp is not None and name in mlp.writers), n - lost * (mlp is not None and name == mlp.reader)
        energy = energies.get(f"{name}.{lost}", energies[f"{name}.0"])
        return method.choices({name: (m, n)}, {name: energy})[name]

    # a spectrum's tail is twice the loss
    return [_Option(lost, 2 * float(losses[lost]), [layer(name, lost) for name in block]) for lost in counts]


def _pick(blocks: list[list[_Option]], target: float) -> list[_Option]:
    """The options of least loss at a budget of parameters, or just above it: their ranks come down to it afterwards."""
    low, high = -80.0, 80.0
    for _ in range(100):
        middle = (low + high) / 2
        cost = sum(cost for _, cost, _ in _best(blocks, float(np.exp(middle))))
        low, high = (low, middle) if cost <= target else (middle, high)
    above = [option for _, _, option in _best(blocks, float(np.exp(low)))]
    least = sum(int(layer.cost[0]) for option in above for layer in option.layers)
    return above if least <= target else [option for _, _, option in _best(blocks, float(np.exp(high)))]


def _best(blocks: list[list[_Option]], multiplier: float) -> Iterator[tuple[float, int, _Option]]:
    """Of each block the option with the least loss plus price, that sum, and its parameters."""
    for options in blocks:
        found = []
        for option in options:
            at = [int(np.argmin(layer.loss + multiplier * layer.cost)) for layer in option.layers]
            cost = sum(int(layer.cost[i]) for layer, i in zip(option.layers, at, strict=True))
            loss = option.loss + sum(float(layer.loss[i]) for layer, i in zip(option.layers, at, strict=True))
            found.append((loss + multiplier * cost, cost, option))
        yield min(found, key=lambda entry: entry[0])


def _carry_out(
    channels: Channels,
    index: int,
    block: dict[str, nn.Module],
    mlp: Mlp | None,
    option: _Option,
    curvature: Curvature,
    path: Path,
    device: torch.device,
) -> None:
    """Write what an option makes of a block."""
    if mlp is None or not option.lost:
        channels.write(index, None, torch.empty(0), torch.empty(0), 0.0)
        return
    with open_tensors(path) as file:
        order = file.get_tensor("order").to(device)
    weight = weight_of(block[mlp.reader]).detach().to(device)
    kept = _kept(order, option.lost, weight.shape[1])
    new = without(weight, definite(curvature.metric_inputs(index)[mlp.reader].to(device)), kept)
    channels.write(index, mlp, kept, new, option.loss / 2)


def digest(what: Any) -> str:
    """Eight hex digits that stand for JSON-ready data, for names of folders."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
