"""How the linear layers of one block hang together: which share an input, which write to the residual stream.

Nothing is read from module names: one window runs through the block, and tensors are compared.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rankwise.alloc.stream import BlockStream

ENTRY = ""  # the residual partner that is the block's own input


class _Stop(Exception):
    """Ends a block's forward once a layer's input is there."""


@dataclass
class Layout:
    """One block's order of work.

    Args:
        groups: names of layers that are handed the same tensor, in the order of their first call. A layer that writes
            to the residual stream is a group of its own.
        residual: layer that writes to the residual stream, to the submodule whose input it is added to (`ENTRY`: the
            block's input). Layers whose output goes elsewhere, or through a norm first, are not in it.
        modules: layer or submodule name to module.
    """

    groups: list[list[str]]
    residual: dict[str, str]
    modules: dict[str, nn.Module] = field(repr=False)

    def grab(
        self, stream: BlockStream, index: int, name: str, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """A layer's input `[T, n]`, and what its output will be added to `[T, m]` (None where that is unknown).

        Args:
            stream: the model.
            index: the block, on the device.
            name: the layer.
            hidden: `[1, T, d]` the block's input.

        Returns:
            None if these tokens do not all reach the layer.
        """
        partner = self.residual.get(name)
        caught: dict[str, torch.Tensor] = {ENTRY: hidden}

        def catch(key: str, stop: bool) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                caught[key] = args[0]
                if stop:
                    raise _Stop

            return hook

        with ExitStack() as undo, suppress(_Stop):
            if partner:
                undo.callback(self.modules[partner].register_forward_pre_hook(catch(partner, False)).remove)
            undo.callback(self.modules[name].register_forward_pre_hook(catch(name, True)).remove)
            stream.run(index, hidden)
        if name not in caught or len(_rows(caught[name])) != len(_rows(hidden)):
            return None
        return _rows(caught[name]), None if partner is None else _rows(caught[partner])


@dataclass
class _Seen:
    """What one forward showed: every module's first input and every linear layer's first output, as they were then.

    Args:
        inputs: module to a copy of its input, in the order of the calls.
        outputs: layer to a copy of its output.
        same: module to its input itself and that tensor's version: equal for modules that are handed one tensor.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    same: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def enter(self, name: str) -> Any:
        """A hook for a module's inputs."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and name not in self.inputs:
                self.inputs[name], self.same[name] = args[0].clone(), (args[0], args[0]._version)

        return hook

    def leave(self, name: str) -> Any:
        """A hook for a layer's outputs."""

        def hook(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            if name not in self.outputs:
                self.outputs[name] = out.clone()

        return hook

    def mates(self, a: str, b: str) -> bool:
        """True if two modules were handed the same tensor, and nothing wrote to it in between."""
        (x, before), (y, after) = self.same[a], self.same[b]
        return x is y and before == after


@torch.no_grad()
def learn_layout(stream: BlockStream, index: int, block: dict[str, nn.Module], hidden: torch.Tensor) -> Layout:
    """Run block `index` once on `hidden [1, T, d]` and see how its linear layers `block` hang together.

    Layers that not all tokens of the window reach (unused ones, routed experts) are left out.
    """
    known = set(block.values())
    others = {f"block.{name}": m for name, m in stream.blocks[index].named_modules() if name and m not in known}
    modules = others | block
    seen = _Seen(inputs={ENTRY: hidden.clone()})
    with _watched(seen, modules, block):
        end = stream.run(index, hidden)
    reached = [key for key in seen.inputs if key in block and len(_rows(seen.inputs[key])) == hidden.shape[1]]
    partners = {name: _partner(name, seen, end) for name in reached}
    residual = {name: partner for name, partner in partners.items() if partner is not None}
    groups: list[list[str]] = []
    for name in reached:
        shared = (group for group in groups if seen.mates(group[0], name) and not {group[0], name} & residual.keys())
        mate = next(shared, None)
        if mate is None:
            groups.append([name])
        else:
            mate.append(name)
    return Layout(groups, residual, modules)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[..., n]` as `[T, n]`."""
    return tensor.reshape(-1, tensor.shape[-1])


def _partner(name: str, seen: _Seen, end: torch.Tensor) -> str | None:
    """Whose input plus the layer's output is a later module's input or the block's output, to the last bit."""
    out, order = _rows(seen.outputs[name]), list(seen.inputs)
    at = order.index(name)
    later = [_rows(tensor) for tensor in (*(seen.inputs[key] for key in order[at + 1 :]), end)]
    for key in order[:at]:
        if _rows(seen.inputs[key]).shape == out.shape:
            total = _rows(seen.inputs[key]) + out
            if any(torch.equal(tensor, total) for tensor in later):
                return key
    return None


@contextmanager
def _watched(seen: _Seen, modules: dict[str, nn.Module], block: dict[str, nn.Module]) -> Iterator[None]:
    """Fill `seen` while the context lasts."""
    with ExitStack() as undo:
        for name, module in modules.items():
            undo.callback(module.register_forward_pre_hook(seen.enter(name)).remove)
            if name in block:
                undo.callback(module.register_forward_hook(seen.leave(name)).remove)
        yield
