"""A dense model whose linear layers run as masked factors for a while, and which is then as it was.

The layers' modules and weights stay where they are; only their `forward` is replaced.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rankwise.alloc.calibration import Calibration
from rankwise.alloc.masks import Drawn
from rankwise.alloc.patches import Forward, forwards, move_buffers
from rankwise.anatomy import block_linears, decoder_blocks, weight_of
from rankwise.kernels import mask_probe, masked_matmul


class MaskedLayer:
    """Factors of one linear layer, and the forward that applies them under the mask drawn last.

    Args:
        linear: the dense layer.
        u: `[m, size]` in the model's dtype.
        v: `[size, n]` likewise.
        probe: let a layer that is dense now still give its mask a gradient.
    """

    def __init__(self, linear: nn.Module, u: torch.Tensor, v: torch.Tensor, *, probe: bool) -> None:
        self.linear, self.u, self.v, self.probe = linear, u, v, probe
        self.dense: Forward = linear.forward
        self.drawn: Drawn | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., n]` to `[..., m]`; the dense layer's own output where no mask is drawn."""
        drawn = self.drawn
        if drawn is None:
            return self.dense(x)
        if drawn.dense:
            y = self.dense(x)
            return mask_probe(y, x, self.v, drawn.mask, self.u) if self.probe else y
        bias: Any = self.linear.bias
        return masked_matmul(x, self.v, drawn.mask, self.u, bias, drawn.keep)


class Overlay:
    """A model on its device with masked linear layers, while the context of `overlaid` lasts.

    Args:
        model: the dense model.
        layers: layer name to its masked form.
        device: where it runs.
    """

    def __init__(self, model: Any, layers: dict[str, MaskedLayer], device: torch.device) -> None:
        self.model, self.layers, self.device = model, layers, device
        _, self.blocks = decoder_blocks(model)

    def set(self, drawn: dict[str, Drawn] | None) -> None:
        """Run under these masks from now on; None: dense."""
        for name, layer in self.layers.items():
            layer.drawn = None if drawn is None else drawn[name]

    def run(self, ids: torch.Tensor, *, taps: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits `[B, T, vocab]` and, if asked for, the hidden states `[B, T, d]` of two taps.

        The taps are the output of the middle decoder block and what enters the head (LLRC).
        """
        seen: dict[str, torch.Tensor] = {}

        def middle(module: Any, args: Any, out: Any) -> None:
            seen["middle"] = out[0] if isinstance(out, tuple) else out

        def last(module: Any, args: Any) -> None:
            seen["last"] = args[0]

        with ExitStack() as hooks:
            if taps:
                block, head = self.blocks[(len(self.blocks) - 1) // 2], self.model.get_output_embeddings()
                hooks.callback(block.register_forward_hook(middle).remove)
                hooks.callback(head.register_forward_pre_hook(last).remove)
            logits = self.model(input_ids=ids, use_cache=False).logits
        return logits, [seen["middle"], seen["last"]] if taps else []


@contextmanager
def overlaid(
    calibration: Calibration, sizes: dict[str, int], *, probe: bool, dense: bool, checkpointing: bool
) -> Iterator[Overlay]:
    """Move the model to the device and replace the forwards of the layers named in `sizes`; undo both at the end.

    Args:
        calibration: model, factors and device.
        sizes: layer to the number of components that its mask covers.
        probe: see `MaskedLayer`.
        dense: the dense weights are used too, beside the factors; else they stay in host memory.
        checkpointing: keep one block's activations at a time, and run each block again in the backward pass.
    """
    model, device = calibration.model, calibration.device
    linears = {name: module for block in block_linears(model) for name, module in block.items()}
    spared = [] if dense else [linears[name] for name in sizes]
    with ExitStack() as undo:
        undo.enter_context(frozen(model))
        undo.enter_context(placed(model, device, spared))
        layers = {name: _masked(name, linears[name], size, calibration, probe) for name, size in sizes.items()}
        overlay = Overlay(model, layers, device)
        undo.enter_context(forwards([linears[name] for name in sizes], list(layers.values())))
        if checkpointing:
            blocks = list(overlay.blocks)
            undo.enter_context(forwards(blocks, [_checkpointed(block.forward) for block in blocks]))
        yield overlay


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradient for the model's own parameters."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


@contextmanager
def placed(model: nn.Module, device: torch.device, spared: Sequence[nn.Module]) -> Iterator[None]:
    """Parameters and buffers on the device, the weights of `spared` layers not; all in host memory again after."""
    if device.type == "cpu":
        yield
        return
    left = {id(module.weight) for module in spared}
    try:
        for parameter in model.parameters():
            if id(parameter) not in left:
                parameter.data = parameter.data.to(device)
        for module in model.modules():
            move_buffers(module, device)
        yield
    finally:
        for parameter in model.parameters():
            parameter.data = parameter.data.to("cpu")
        for module in model.modules():
            move_buffers(module, torch.device("cpu"))


def _masked(name: str, linear: nn.Module, size: int, calibration: Calibration, probe: bool) -> MaskedLayer:
    weight = weight_of(linear)
    u, v = (factor.to(calibration.device, weight.dtype) for factor in calibration.factors.load(name, size))
    return MaskedLayer(linear, u, v, probe=probe)


def _checkpointed(forward: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
