"""Changes to a model that last as long as a context: replaced forwards, moved buffers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]


@contextmanager
def forwards(modules: Sequence[nn.Module] | nn.ModuleList, replacements: Sequence[Forward]) -> Iterator[None]:
    """Replace the modules' forward methods while the context lasts."""
    with ExitStack() as undo:
        for module, forward in zip(modules, replacements, strict=True):
            earlier = module.__dict__.get("forward")  # accelerate puts its hooks there
            module.__dict__["forward"] = forward
            if earlier is None:
                undo.callback(module.__dict__.pop, "forward")
            else:
                undo.callback(module.__dict__.__setitem__, "forward", earlier)
        yield


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """A module's own buffers, not those of the modules below it."""
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
