"""How many channels every MLP keeps: against ranks, under one Lagrange multiplier.

For a few widths of each MLP the spectra of its layers are worked out as they would be without the channels that cost
least (`alloc.removal`). A block then has one curve of loss against parameters for each width, and the multiplier that
meets the budget picks width and ranks together. The ranks are chosen once more, exactly, when the factors are there.
Where channels promise little, as under large budgets of parameters, they all stay: predictions are not good enough to
tell. (Budgets of bytes have plans with and without them tried on text.)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rankwise.alloc.budget import multiplier
from rankwise.alloc.channels import Channels
from rankwise.alloc.curvature import Curvature
from rankwise.alloc.methods.base import LEAST, NEVER_SEEN, Method
from rankwise.alloc.mlps import Mlp, find_mlp
from rankwise.alloc.spectra import Block, Chooser, Option
from rankwise.alloc.stream import BlockStream
from rankwise.anatomy import block_linears, features
from rankwise.distributed import barrier, is_main
from rankwise.errors import RankwiseError
from rankwise.files import digest
from rankwise.jobs import claim
from rankwise.progress import Track, silent

WIDTHS = 13  # of an MLP that are looked at, all channels included
WORTH = 0.05  # share of the predicted loss that taking out channels must save; less did not hold on other text


@dataclass(frozen=True)
class WidthBudget:
    """What widths are chosen under.

    Args:
        choose: what a layer may become at a width.
        removal: what a nat lost with channels counts in the units of the choices' losses.
        target: what the choices of all layers may cost together.
        worth: share of the predicted loss that taking out channels must save.
        identity: what decides the choices, beside the method's options, as JSON-ready data.
    """

    choose: Chooser
    removal: float
    target: float
    worth: float
    identity: dict[str, Any]


def parameter_budget(method: Method, total: int) -> WidthBudget:
    """A method's own: the share that it keeps of `total` parameters; energies are twice the loss."""
    target, identity = method.ratio * total, {"worth": WORTH}
    return WidthBudget(lambda n, shape, e: method.choices({n: shape}, {n: e})[n], 2.0, target, WORTH, identity)


def choose_channels(
    model: Any,
    curvature: Curvature,
    method: Method,
    window: torch.Tensor,
    folder: Path,
    *,
    device: torch.device,
    planned: Mapping[str, int] | None = None,
    budget: WidthBudget | None = None,
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
        budget: in place of the method's own of parameters.
        track: progress.

    Raises:
        RankwiseError: a planned layer is none that reads channels.
    """
    linears = block_linears(model)
    originals = [{name: features(m) for name, m in block.items()} for block in linears]
    asked: dict[str, Any] = {"options": method.options(), "planned": planned, "widths": [WIDTHS, LEAST]}
    if budget is None and planned is None:
        budget = parameter_budget(method, sum(m * n for block in originals for m, n in block.values()))
    if budget is not None:
        asked |= budget.identity
    channels = Channels(folder / f"channels-{digest(asked, 8)}", originals, asked | curvature.identity)
    if is_main():
        claim(channels.folder, "channels", channels.identity)
        if not all(channels.file(index).exists() for index in range(len(linears))):
            blocks = _survey(linears, _find(model, linears, window, device), method, planned, folder, curvature)
            for block, lost in zip(blocks, _choose(blocks, curvature, budget, device, track), strict=True):
                block.carry_out(channels, lost, curvature, device)
    barrier()
    return channels


def _survey(
    linears: list[dict[str, nn.Module]],
    mlps: list[Mlp | None],
    method: Method,
    planned: Mapping[str, int] | None,
    folder: Path,
    curvature: Curvature,
) -> list[Block]:
    """The blocks, how many channels of each may go, and a folder for what that costs."""
    counts = [_counts(mlp, block, method, planned) for mlp, block in zip(mlps, linears, strict=True)]
    asked = {"lost": counts, "planned": planned is not None}
    place = folder / f"spectra-{digest(asked, 8)}"
    claim(place, "spectra", asked | curvature.identity)
    parts = enumerate(zip(linears, mlps, counts, strict=True))
    return [Block(i, block, mlp, lost, place / f"spectra_{i:03d}.safetensors") for i, (block, mlp, lost) in parts]


def _choose(
    blocks: list[Block],
    curvature: Curvature,
    budget: WidthBudget | None,
    device: torch.device,
    track: Track,
) -> list[int]:
    """How many channels each block loses; as many as may go where that is not for a budget to decide."""
    if not any(block.counts[-1] for block in blocks):
        return [0] * len(blocks)
    with track("channels", len(blocks)) as advance:
        for block in blocks:
            if not block.path.exists():
                block.measure(curvature, device, planned=budget is None)
            advance()
    if budget is None:
        return [block.counts[-1] for block in blocks]
    options = [block.options(budget.choose, budget.removal) for block in blocks]
    return _worthwhile(options, budget)


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


def _worthwhile(blocks: list[list[Option]], budget: WidthBudget) -> list[int]:
    """How many channels each block loses; none where that saves too little of the loss."""
    picked = _pick(blocks, budget.target)
    all_stay = [option for options in blocks for option in options if not option.lost]
    forced = _least_cost(all_stay) > budget.target
    if forced or not budget.worth:
        return [option.lost for option in picked]
    fewer, whole = (_loss_at(options, budget.target) for options in (picked, all_stay))
    worth = fewer < (1 - budget.worth) * whole
    return [option.lost if worth else 0 for option in picked]


def _pick(blocks: list[list[Option]], target: float) -> list[Option]:
    """The options of least loss at a budget, or just above it: their ranks come down to it afterwards."""
    low, high = _prices(blocks, target)
    above = [option for _, _, option in _best(blocks, low)]
    return above if _least_cost(above) <= target else [option for _, _, option in _best(blocks, high)]


def _loss_at(options: list[Option], target: float) -> float:
    """The least predicted loss at a budget and these widths, by the Lagrangian's bound; unseen layers do not count."""
    blocks = [[option] for option in options]
    price = _prices(blocks, target)[0]
    spent = sum(cost for _, cost, _ in _best(blocks, price))
    return sum(_seen(option, price) for option in options) + price * (spent - target)


def _seen(option: Option, price: float) -> float:
    """What an option loses in layers that the text reached."""
    best = [layer.loss[int(np.argmin(layer.loss + price * layer.cost))] for layer in option.layers]
    return option.loss + float(sum(loss for loss in best if loss < NEVER_SEEN))


def _prices(blocks: list[list[Option]], target: float) -> tuple[float, float]:
    return multiplier(lambda price: sum(cost for _, cost, _ in _best(blocks, price)), target)


def _least_cost(options: list[Option]) -> int:
    return sum(int(layer.cost[0]) for option in options for layer in option.layers)


def _best(blocks: list[list[Option]], price: float) -> Iterator[tuple[float, int, Option]]:
    """Of each block the option of least loss plus price times cost: that sum, its cost, and the option."""
    for options in blocks:
        found = []
        for option in options:
            at = [int(np.argmin(layer.loss + price * layer.cost)) for layer in option.layers]
            cost = sum(int(layer.cost[i]) for layer, i in zip(option.layers, at, strict=True))
            loss = option.loss + sum(float(layer.loss[i]) for layer, i in zip(option.layers, at, strict=True))
            found.append((loss + price * cost, cost, option))
        yield min(found, key=lambda entry: entry[0])
