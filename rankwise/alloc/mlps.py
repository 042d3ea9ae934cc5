"""Where a block has channels: features that some layers write, each by one row, and one layer alone reads.

In an MLP `down(act(gate(x)) * up(x))` feature i between the layers is made by row i of `gate` and of `up`, and read by
column i of `down`. Nothing is read from module names: a guess is made from the layers' sizes and the order of their
calls, then every other channel is taken out, and the block must give what it gives with those channels set to nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.alloc.layout import learn_layout
from rankwise.alloc.stream import BlockStream
from rankwise.anatomy import features, weight_of

CLOSE = 0.02  # of the largest output: sums of one term less are rounded otherwise


@dataclass(frozen=True)
class Mlp:
    """Layers that share channels.

    Args:
        writers: names of the layers whose rows they are.
        reader: of the layer whose columns they are.
    """

    writers: tuple[str, ...]
    reader: str


@torch.no_grad()
def find_mlp(stream: BlockStream, index: int, block: dict[str, nn.Module], hidden: torch.Tensor) -> Mlp | None:
    """The MLP of block `index`, which is on the device; None where no channel can be taken out by itself.

    Args:
        block: its linear layers.
        hidden: `[1, T, d]` inputs of the block.
    """
    groups = learn_layout(stream, index, block, hidden).groups
    order = [name for group in groups for name in group]
    for at, reader in reversed(list(enumerate(order))):
        channels = features(block[reader])[1]
        fit = tuple(name for name in order[:at] if features(block[name])[0] == channels)
        last = next((set(group) for group in reversed(groups) if fit and fit[-1] in group), set())
        alone = tuple(name for name in fit if name in last)
        for writers in dict.fromkeys((fit, alone)):  # another layer may be as wide by chance
            mlp = Mlp(writers, reader)
            if writers and channels > 1 and _stands(stream, index, block, mlp, hidden):
                return mlp
    return None


def _stands(stream: BlockStream, index: int, block: dict[str, nn.Module], mlp: Mlp, hidden: torch.Tensor) -> bool:
    """Whether the block without every other channel does what it does with those channels at nothing."""
    reader = weight_of(block[mlp.reader]).detach()
    kept = torch.arange(0, reader.shape[1], 2, device=reader.device)
    silent = reader.clone()
    silent[:, 1::2] = 0
    with swapped(block, {mlp.reader: silent}):
        expected = stream.run(index, hidden)
    fewer = {name: weight_of(block[name]).detach()[kept] for name in mlp.writers} | {mlp.reader: reader[:, kept]}
    try:
        with swapped(block, fewer, dict.fromkeys(mlp.writers, kept)):
            found = stream.run(index, hidden)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):  # the width is written down somewhere else: heads, norms
        return False
    added = expected.float() - hidden.float()
    return bool((found.float() - expected.float()).abs().amax() <= CLOSE * added.abs().amax())


@contextmanager
def swapped(
    block: Mapping[str, nn.Module],
    weights: Mapping[str, torch.Tensor],
    rows: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[None]:
    """Other weights `[m, n]` in the named layers while the context lasts, and of biases the `rows` that are left."""
    kept: dict[str, tuple[Any, Any]] = {}  # weight and bias
    try:
        for name, weight in weights.items():
            module: Any = block[name]
            bias = module.bias
            kept[name] = module.weight.data, bias if bias is None else bias.data
            data = weight.to(kept[name][0])
            _put(module, data.T.contiguous() if isinstance(module, Conv1D) else data)
            if bias is not None and rows is not None and name in rows:
                bias.data = bias.data[rows[name].to(bias.device)]
        yield
    finally:
        for name, (weight, bias) in kept.items():
            module = block[name]
            _put(module, weight)
            if bias is not None:
                module.bias.data = bias


def _put(module: Any, weight: torch.Tensor) -> None:
    module.weight.data = weight
    if isinstance(module, Conv1D):
        module.nf = weight.shape[1]  # its forward goes by it
