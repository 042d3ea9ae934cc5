"""What people do with a model that transformers opened: dtypes, device maps, adapters, continuous batching."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fourbit import in_turn, wide_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

import rankwise
from rankwise.engine.layers import CompressedLinear
from rankwise.storage import Precision

WINDOWS = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))
STORED = [Precision("fp32"), Precision("nf4"), Precision("int4", 64, True)]
FIXED = {torch.uint8, torch.int32, torch.float32, torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind, in 32 bits and in 4."""
    model = wide_model()
    plan = in_turn(rankwise.allocate(model, WINDOWS, rankwise.Uniform(ratio=0.6, rank_multiple=1)), STORED)
    return rankwise.save(rankwise.compress(model, plan), None, plan, tmp_path_factory.mktemp("made") / "small")


@pytest.fixture(scope="module")
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(WINDOWS).logits


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True},
        {"dtype": "auto"},
        {"dtype": torch.float32, "device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"use_safetensors": True},
    ],
    ids=str,
)
def test_options_that_change_nothing(options: dict[str, Any], folder: Path, logits: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    torch.testing.assert_close(model(WINDOWS.to(model.device)).logits.cpu(), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtypes(name: str, folder: Path, logits: torch.Tensor) -> None:
    """Numbers in 16 bits or more are in the dtype that is asked for; codes, scales and indices are what they are."""
    model = AutoModelForCausalLM.from_pretrained(folder, **{name: torch.bfloat16})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for module in model.modules():
        for key, tensor in module._buffers.items() if isinstance(module, CompressedLinear) else ():
            assert tensor is not None
            wanted = {"absmax": torch.float32, "scale": torch.bfloat16, "index": torch.int32}
            assert tensor.dtype == wanted.get(key.rpartition("_")[2], torch.uint8), key
    # rounding to 8 bits of mantissa moves logits, not what they say
    likeness = torch.nn.functional.cosine_similarity(model(WINDOWS).logits.float(), logits, dim=-1)
    assert likeness.min() > 0.99


def test_layers_on_disk_at_first(folder: Path, tmp_path: Path, logits: torch.Tensor) -> None:
    """A device map may leave layers in files, from which accelerate brings them when they run."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.model.layers[1].parameters())
    torch.testing.assert_close(model(WINDOWS).logits, logits, rtol=1e-4, atol=1e-4)


def test_adapters_are_trained_on_top(folder: Path, logits: torch.Tensor, tmp_path: Path) -> None:
    """LoRA beside layers of every kind: the loss falls, the layers stay, and the adapter is saved and found again."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.hf_quantizer.is_trainable
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, adapters())
    torch.testing.assert_close(adapted(WINDOWS).logits, logits, rtol=1e-4, atol=1e-4)  # an adapter begins as nothing
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2
    optimiser, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(6):
        loss = adapted(WINDOWS, labels=WINDOWS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in adapted.get_base_model().state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name
    adapted.save_pretrained(tmp_path)
    again = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), adapters())
    again.load_adapter(tmp_path, "default")
    again.set_adapter("default")
    torch.testing.assert_close(again(WINDOWS).logits, adapted(WINDOWS).logits, rtol=1e-4, atol=1e-4)


def adapters() -> LoraConfig:
    """PEFT knows `nn.Linear`; of other layers it must be told."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")
    config._register_custom_module({CompressedLinear: LoraLinear})
    return config


def test_continuous_batching(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    prompts = [WINDOWS[row, : 4 + row].tolist() for row in range(4)]
    how = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1)
    batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=128)
    done = model.generate_batch(inputs=prompts, generation_config=how, continuous_batching_config=batching)
    said = sorted((one.prompt_ids, one.generated_tokens) for one in done.values())
    for prompt, tokens in said:
        assert model.generate(torch.tensor([prompt]), generation_config=how)[0, len(prompt) :].tolist() == tokens
    assert [prompt for prompt, _ in said] == sorted(prompts)
