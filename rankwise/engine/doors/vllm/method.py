"""How vLLM's linear layers run where a checkpoint of ours has them compressed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from rankwise.engine.doors.vllm.groups import Halves, halves, whole
from rankwise.engine.doors.vllm.layout import Layout
from rankwise.engine.doors.vllm.parts import GUARD, Part
from rankwise.engine.layers import CompressedLinear
from rankwise.engine.runtime.mixed import Group, packed_linear
from rankwise.layerspec import LayerSpec

FIRST, SECOND, ALL = 0, 1, 2


class RankwiseLinearMethod(LinearMethodBase):
    """One of vLLM's linear layers, made of one or more layers of the checkpoint.

    A lowrank or pivot layer split by its inputs adds up between its factors, where there are `rank` numbers a token to
    send and not `out_features`; unless vLLM runs LoRA adapters, or was told not to add up at all.

    Args:
        names: of the checkpoint's layers, in order.
        specs: of those; None for dense ones.
    """

    def __init__(self, names: Sequence[str], specs: Sequence[LayerSpec | None]) -> None:
        self.names, self.specs = names, specs
        self.parts: list[Part] = []
        self.group: Group | Halves
        self.by_rank = 0

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As vLLM asks: make room for this rank's share, under the names that its loaders will look for."""
        config = get_current_vllm_config()
        layout = Layout(layer, self.names, self.specs, input_size_per_partition, output_partition_sizes)
        device = torch.empty(0).device
        cuts = [layout.cut(number) for number in range(len(self.names))]
        self.outputs, self.dummy = sum(cut.outputs for cut in cuts), config.load_config.load_format == "dummy"
        parts = zip(self.names, layout.specs, cuts, strict=True)
        self.parts = [Part(name, spec, cut, layout.ranks, params_dtype, device) for name, spec, cut in parts]
        self.key = f"rankwise:{layer.prefix}"  # compiled code finds the layer by it
        config.compilation_config.static_forward_context[self.key] = self
        if layout.ranks > 1 and layer.reduce_results and config.lora_config is None:
            spec = layout.specs[0]
            self.by_rank = 0 if spec.kind == "dense" else spec.rank
            layer.reduce_results = not self.by_rank
        self._slots(layer, layout, params_dtype, device)

    def _slots(self, layer: Any, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        """A parameter for each tensor name, through which vLLM hands over what it reads."""

        def loader(name: str) -> Any:
            def load(_: Parameter, tensor: torch.Tensor, shard: Any = None) -> None:
                self.parts[layout.part(shard)].load(name, tensor)

            return load

        stored = {name: tensor for part in self.parts for name, tensor in part.spec.tensors.items()}
        fixed = ("uint8", "int8", "int32", "float32")
        kinds = {name: tensor.dtype for name, tensor in stored.items() if tensor.dtype in fixed}
        for name in {GUARD, *stored}:
            kind = getattr(torch, kinds[name]) if name in kinds else dtype
            slot = Parameter(torch.zeros(int(name == GUARD), dtype=kind, device=device), requires_grad=False)
            layer.register_parameter(name, slot)
            set_weight_attrs(slot, {"weight_loader": loader(name)})

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """As vLLM asks: everything is read; put it in the order in which it runs."""
        for part in self.parts:
            part.finish(self.dummy)
        modules = [part.module for part in self.parts]
        if self.by_rank:
            assert isinstance(modules[0], CompressedLinear)
            self.group = halves(modules[0])
        else:
            self.group = whole(modules)
        self.parts = []
        for name in [name for name, slot in layer.named_parameters(recurse=False) if not slot.numel()]:
            delattr(layer, name)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., inputs]` to `[..., outputs]` of this rank."""
        if self.by_rank:
            z = tensor_model_parallel_all_reduce(self._call(x, FIRST, self.by_rank))
            y, bias = self._call(z, SECOND, self.outputs), None if layer.skip_bias_add else layer.bias
        else:
            y = self._call(x, ALL, self.outputs)
        return y if bias is None else y + bias

    def _call(self, x: torch.Tensor, step: int, outputs: int) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.rankwise.vllm_linear(x, self.key, step, outputs)
        return self.run(x, step)

    def run(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """One step: all of the layer, or its first or second factor; always a new tensor, as its op has promised."""
        if not isinstance(self.group, Halves):
            return packed_linear(x, self.group)
        return packed_linear(x, self.group.first) if step == FIRST else self.group.finish(x)


def _linear(x: torch.Tensor, key: str, step: int, outputs: int) -> torch.Tensor:
    return get_forward_context().no_compile_layers[key].run(x, step)


def _shape(x: torch.Tensor, key: str, step: int, outputs: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


# One node for the compiler: which kernels run depends on the number of tokens, which compiled code does not know.
# Without a gradient, and registered by hand: a call of `torch.library.custom_op` takes nearly twice as long.
if not hasattr(torch.ops.rankwise, "vllm_linear"):
    _LIBRARY = torch.library.Library("rankwise", "FRAGMENT")
    _LIBRARY.define("vllm_linear(Tensor x, str key, int step, int outputs) -> Tensor")
    _LIBRARY.impl("vllm_linear", _linear, "CompositeExplicitAutograd")
    torch.library.register_fake("rankwise::vllm_linear", _shape, lib=_LIBRARY)
