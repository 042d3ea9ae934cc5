"""Run a causal language model one decoder block at a time.

The model stays in host memory; one block visits the device. What a block is called with besides the hidden
states (rotary angles, masks, positions) is recorded once from the model's own forward, so every
architecture that passes hidden states from block to block works without special cases.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from rankwise.alloc.patches import Forward, forwards, move_buffers
from rankwise.anatomy import decoder_blocks
from rankwise.errors import RankwiseError

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward once the first block has been reached."""


class BlockStream:
    """A model cut into embedding, blocks and head.

    Args:
        model: a causal language model in host memory, eval mode.
        device: where blocks compute.
        window: `[1, T]` token ids of the length that all later windows have.
    """

    def __init__(self, model: Any, device: torch.device, window: torch.Tensor) -> None:
        self.model, self.device = model, device
        _, self.blocks = decoder_blocks(model)
        self._as_tuple = False
        self._move_frame(device)
        try:
            self._calls = self._learn_calls(window)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.blocks)

    def close(self) -> None:
        """Bring the embedding and the head back to host memory."""
        self._move_frame(torch.device("cpu"))

    @torch.no_grad()
    def embed(self, window: torch.Tensor) -> torch.Tensor:
        """`[1, T]` ids to the hidden states `[1, T, d]` that enter the first block, in host memory."""
        caught: list[torch.Tensor] = []

        def catch(*args: Any, **kwargs: Any) -> None:
            caught.append(_hidden(args, kwargs)[0])
            raise _Stop

        with forwards(self.blocks[:1], [catch]), suppress(_Stop):
            self._call(window)
        return caught[0].cpu()

    @contextmanager
    def on_device(self, index: int) -> Iterator[nn.Module]:
        """Block `index`, on the device while the context lasts."""
        block = self.blocks[index]
        try:
            yield block.to(self.device)
        finally:
            block.to("cpu")

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[1, T, d]` on the device through block `index` (inside `on_device`)."""
        args, kwargs = self._calls[index]
        out = self.blocks[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def head(self, window: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[1, T, vocab]` from the last block's output, by the model's own final norm and head."""

        def inject(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._as_tuple else hidden

        with forwards(self.blocks, [inject] * len(self.blocks)):
            return self._call(window).logits

    def _call(self, window: torch.Tensor) -> Any:
        return self.model(input_ids=window.to(self.device), use_cache=False)

    def _learn_calls(self, window: torch.Tensor) -> list[Call]:
        calls = self._record(window)
        for index, (seen, other) in enumerate(zip(calls, self._record(window.flip(1)), strict=True)):
            if not _same(seen, other):
                reason = f"{type(self.model).__name__}: block {index} takes side inputs that depend on the tokens"
                raise RankwiseError("model", reason, "blocks that pass on hidden states alone are supported")
        return calls

    @torch.no_grad()
    def _record(self, window: torch.Tensor) -> list[Call]:
        """What each block is called with besides the hidden states."""
        original = self.blocks[0].forward
        calls: list[Call] = []

        def recorder(index: int) -> Forward:
            def record(*args: Any, **kwargs: Any) -> Any:
                hidden, rest, named = _hidden(args, kwargs)
                calls.append((rest, named))
                if index == 0:
                    with self.on_device(0):
                        self._as_tuple = isinstance(original(*args, **kwargs), tuple)
                return (hidden,) if self._as_tuple else hidden

            return record

        with forwards(self.blocks, [recorder(i) for i in range(len(self.blocks))]):
            self._call(window)
        return calls

    def _move_frame(self, device: torch.device) -> None:
        inside = {id(module) for module in self.blocks.modules()}
        for module in self.model.modules():
            if id(module) in inside:
                continue
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            move_buffers(module, device)


def _same(a: Any, b: Any) -> bool:
    """True if two calls hold equal tensors in the same places; what is no tensor is not compared."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return True


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split a block's call into the hidden states and the rest."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest
