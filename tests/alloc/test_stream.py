"""A model run block by block says what the model says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from rankwise.alloc.stream import BlockStream
from rankwise.anatomy import decoder_blocks
from rankwise.errors import RankwiseError

CPU = torch.device("cpu")


def windows(count: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(2, 512, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def through(stream: BlockStream, window: torch.Tensor) -> torch.Tensor:
    hidden = stream.embed(window)
    for index in range(len(stream)):
        with stream.on_device(index):
            hidden = stream.run(index, hidden)
    return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_blocks_in_a_chain_equal_the_model(dtype: torch.dtype, family: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(family, dtype), windows()
    expected = [model(input_ids=window[None]).logits for window in ids]
    stream = BlockStream(model, CPU, ids[:1])
    assert len(stream) == 2
    for window, logits in zip(ids, expected, strict=True):
        with torch.no_grad():
            assert torch.equal(stream.head(window[None], through(stream, window[None])), logits)


def test_blocks_of_different_attention_keep_their_own_masks() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**sizes, **heads, layer_types=kinds)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.mul_(4)
    ids = windows()
    stream = BlockStream(model, CPU, ids[:1])
    for window in ids:
        with torch.no_grad():
            logits = stream.head(window[None], through(stream, window[None]))
        assert torch.equal(logits, model(input_ids=window[None]).logits)


def test_hidden_states_are_those_of_the_model(family: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(family), windows()
    caught: list[torch.Tensor] = []
    _, blocks = decoder_blocks(model)
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: caught.append((args or (kwargs.get("hidden_states"),))[0]), with_kwargs=True
        )
        for block in blocks
    ]
    model(input_ids=ids[1:2])
    for handle in handles:
        handle.remove()
    stream = BlockStream(model, CPU, ids[:1])
    hidden = stream.embed(ids[1:2])
    assert torch.equal(hidden, caught[0])
    with torch.no_grad(), stream.on_device(0):
        assert torch.equal(stream.run(0, hidden), caught[1])


def test_gradients_pass_through_head_and_blocks(family: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(family), windows(2)
    weights = torch.randn(1, 40, 512, generator=torch.Generator().manual_seed(2))
    caught: list[torch.Tensor] = []

    def start_here(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = (args or (kwargs.get("hidden_states"),))[0].detach().requires_grad_()
        caught.append(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    _, blocks = decoder_blocks(model)
    handle = blocks[0].register_forward_pre_hook(start_here, with_kwargs=True)
    (model(input_ids=ids[1:2]).logits * weights).sum().backward()
    handle.remove()

    stream = BlockStream(model, CPU, ids[:1])
    first = stream.embed(ids[1:2]).requires_grad_()
    with stream.on_device(0), stream.on_device(1):
        (stream.head(ids[1:2], stream.run(1, stream.run(0, first))) * weights).sum().backward()
    assert first.grad is not None
    assert caught[0].grad is not None
    assert torch.allclose(first.grad, caught[0].grad, rtol=1e-4, atol=1e-6 * float(caught[0].grad.abs().max()))


def test_model_is_as_before_when_done(family: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(family), windows(1)
    before, state = model(input_ids=ids).logits, {name: t.clone() for name, t in model.state_dict().items()}
    stream = BlockStream(model, CPU, ids)
    through(stream, ids)
    stream.close()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in block.__dict__ for block in decoder_blocks(model)[1])


def test_model_is_as_before_after_a_failure(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), windows(1)
    before = model(input_ids=ids).logits
    stream = BlockStream(model, CPU, ids)
    with pytest.raises(IndexError):
        stream.embed(ids + 512)
    with pytest.raises(RuntimeError):
        stream.head(ids, torch.zeros(1, 40, 7))
    assert torch.equal(model(input_ids=ids).logits, before)


def test_one_block_at_a_time_visits_the_device(tiny: Callable[..., Any]) -> None:
    model, ids = tiny("llama"), windows(1)
    blocks = decoder_blocks(model)[1]
    stream = BlockStream(model, CPU, ids)
    stream.device = torch.device("meta")
    with stream.on_device(1) as block:
        assert block is blocks[1]
        assert {p.device.type for p in blocks[1].parameters()} == {"meta"}
        assert {p.device.type for p in blocks[0].parameters()} == {"cpu"}
        block.to_empty(device="cpu")  # meta tensors cannot be copied back


def test_side_inputs_that_depend_on_the_tokens_are_not_taken_from_another_window() -> None:
    """Some Gemma 4 models hand each block a second embedding of the tokens."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("transformers is older than Gemma 4")
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        intermediate_size=48,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=512,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    ids = windows(2)
    try:
        stream = BlockStream(model, CPU, ids[:1])
        logits = stream.head(ids[1:], through(stream, ids[1:]))
    except RankwiseError:
        return  # saying that it cannot is as good
    assert torch.allclose(logits, model(input_ids=ids[1:]).logits, atol=1e-5)
