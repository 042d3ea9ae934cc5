"""How layers hang together is found from tensors alone, in every family; inputs are those of a whole forward."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, FalconConfig, GPTNeoXConfig, PhiConfig

from rankwise.alloc.layout import ENTRY, Layout, learn_layout
from rankwise.alloc.stream import BlockStream
from rankwise.anatomy import block_linears

CPU = torch.device("cpu")
QKV, GATE_UP = "q_proj k_proj v_proj", "gate_proj up_proj"
GROUPS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "opt": [QKV, "out_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
}
RESIDUAL = {
    "gemma3": {},  # a norm stands between its layers and the stream
    "opt": {"out_proj": ENTRY, "fc2": "block.final_layer_norm"},
    "gpt2": {"attn.c_proj": ENTRY, "mlp.c_proj": "block.ln_2"},
}
SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
PARALLEL = {
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=48),
    "phi": lambda: PhiConfig(**SIZES, intermediate_size=48),
    "cohere": lambda: CohereConfig(**SIZES, intermediate_size=48),
    "falcon": lambda: FalconConfig(**SIZES, multi_query=False),  # adds to a layer's output in place
}


class Opened:
    """A model's first block, and a window on its way into it."""

    def __init__(self, model: Any, seed: int = 1) -> None:
        window = torch.randint(2, 512, (1, 24), generator=torch.Generator().manual_seed(seed))
        self.stream = BlockStream(model, CPU, window)
        self.block, self.hidden = block_linears(model)[0], self.stream.embed(window)
        self.layout = learn_layout(self.stream, 0, self.block, self.hidden)

    def short(self, name: str) -> str:
        """The shortest ending of a layer's name that no other layer of the block has."""
        parts = name.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts)))
        return next(e for e in endings if sum(other.endswith(e) for other in self.block) == 1)

    def groups(self) -> list[str]:
        """Groups with short names."""
        return [" ".join(self.short(name) for name in group) for group in self.layout.groups]

    def residual(self) -> dict[str, str]:
        """Partners with short names."""
        return {self.short(name): partner for name, partner in self.layout.residual.items()}

    def grab(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of a layer that the window reaches."""
        found = self.layout.grab(self.stream, 0, name, self.hidden)
        assert found is not None
        return found


def change_mlp(model: Any, forward: Callable[[Any, torch.Tensor], torch.Tensor], **layers: nn.Module) -> Any:
    """Another feed-forward part in the first block."""
    mlp = model.model.layers[0].mlp
    for name, layer in layers.items():
        mlp.add_module(name, layer.requires_grad_(False))
    mlp.forward = MethodType(forward, mlp)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_family_is_understood(dtype: torch.dtype, family: str, tiny: Callable[..., Any]) -> None:
    opened = Opened(tiny(family, dtype))
    assert opened.groups() == GROUPS.get(family, [QKV, "o_proj", GATE_UP, "down_proj"])
    usual = {"o_proj": ENTRY, "down_proj": "block.post_attention_layernorm"}
    assert opened.residual() == RESIDUAL.get(family, usual)


@pytest.mark.parametrize("name", PARALLEL)
def test_no_layer_of_a_parallel_block_has_a_partner(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PARALLEL[name](), dtype=torch.float32).eval()
    opened = Opened(model)
    assert opened.residual() == {}
    assert sorted(name for group in opened.layout.groups for name in group) == sorted(opened.block)


@torch.no_grad()
def test_what_is_grabbed_is_what_a_whole_forward_has(family: str, tiny: Callable[..., Any]) -> None:
    opened = Opened(tiny(family), seed=2)
    whole: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            whole[name], outputs[name] = args[0].clone(), out.clone()

        return note

    for name, layer in opened.block.items():
        layer.register_forward_hook(hook(name))
    end = opened.stream.run(0, opened.hidden)
    for name in opened.block:
        x, beside = opened.grab(name)
        assert torch.equal(x, whole[name].reshape(x.shape))
        assert (beside is None) == (name not in opened.layout.residual)
    if opened.layout.residual:
        last = list(opened.layout.residual)[-1]
        beside = opened.grab(last)[1]
        assert beside is not None
        assert torch.equal(beside + outputs[last].reshape(beside.shape), end[0])


@torch.no_grad()
def test_grabbing_leaves_no_hooks_and_ends_early(tiny: Callable[..., Any]) -> None:
    opened = Opened(tiny("llama"))
    calls: list[str] = []
    opened.stream.blocks[0].mlp.register_forward_pre_hook(lambda module, args: calls.append("mlp"))
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in opened.stream.blocks[0].modules()]
    opened.grab("model.layers.0.self_attn.o_proj")
    assert calls == []
    opened.grab("model.layers.0.mlp.down_proj")
    assert calls == ["mlp"]
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in opened.stream.blocks[0].modules()]


def test_layers_that_not_every_token_reaches_are_left_out(tiny: Callable[..., Any]) -> None:
    """An unused layer, and one that is given some of the tokens, as experts are."""

    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        y = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        return torch.cat([y[:, :5] + mlp.routed(x[:, :5]), y[:, 5:]], dim=1)

    layers = {"spare": nn.Linear(32, 32), "routed": nn.Linear(32, 32)}
    opened = Opened(change_mlp(tiny("llama"), forward, **layers))
    assert opened.groups() == [QKV, "o_proj", GATE_UP, "down_proj"]
    for name in ("spare", "routed"):
        full = f"model.layers.0.mlp.{name}"
        assert full in opened.block
        other = Layout([[full]], {}, opened.layout.modules)  # as learnt from a window that took another route
        assert other.grab(opened.stream, 0, full, opened.hidden) is None


def test_a_tensor_that_was_written_to_in_between_is_another_input(tiny: Callable[..., Any]) -> None:
    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        gate = mlp.gate_proj(x)
        return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x.mul_(2)))

    assert Opened(change_mlp(tiny("llama"), forward)).groups() == [QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_a_layer_that_writes_to_the_stream_is_a_group_of_its_own(tiny: Callable[..., Any]) -> None:
    """Its moments hold what the stream has lost, which is nothing to a layer that only shares its input."""

    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        return mlp.writer(x)

    opened = Opened(change_mlp(tiny("llama"), forward, writer=nn.Linear(32, 32)))
    assert opened.groups() == [QKV, "o_proj", GATE_UP, "down_proj", "writer"]
    assert opened.residual() == {"o_proj": ENTRY, "writer": "block.post_attention_layernorm"}
