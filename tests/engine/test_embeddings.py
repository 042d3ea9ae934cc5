"""Embedding tables in 8 bits: the same numbers in transformers, in files and in the runtime; tied heads stay tied."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rankwise
from rankwise.engine.checkpoint import open_checkpoint, save, verify
from rankwise.engine.embeddings import CodedEmbedding, TiedHead, code_embeddings, find_ends
from rankwise.engine.layers import QuantisedLinear
from rankwise.engine.runtime.loader import convert
from rankwise.errors import RankwiseError
from rankwise.kernels.int8 import Int8, dequantize_int8, quantize_int8
from rankwise.kernels.native_linear import HostGroup
from rankwise.kernels.native_panels import panels_of, take_rows
from rankwise.pipeline import tensor_bytes
from rankwise.plan import RankPlan

IDS = torch.randint(2, 500, (2, 12), generator=torch.Generator().manual_seed(4))

METHOD = rankwise.Uniform(0.6, rank_multiple=4, tolerance=0.1)


def twin(coded: Any, dense: Any) -> Any:
    """The dense model with the numbers that the codes stand for."""
    model = deepcopy(dense)
    for name in find_ends(coded):
        layer = coded.get_submodule(name)
        weight = model.get_submodule(name).weight
        weight.copy_(dequantize_int8(Int8(layer.weight_int8, layer.weight_scale), weight.dtype))
    return model


@pytest.fixture
def saved(tiny: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """A model whose layers stay dense and whose tables are coded, and its folder."""

    def make(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
        dense = tiny(family, dtype)
        plan = rankwise.allocate(
            deepcopy(dense), IDS, rankwise.Uniform(0.6, rank_multiple=4, tolerance=0.1), work=tmp_path / "work"
        )
        plan.embeddings = dict.fromkeys(find_ends(dense), "int8")
        model = rankwise.compress(dense, plan)
        plan.other_bytes = tensor_bytes(model) - plan.bytes
        save(model, None, plan, tmp_path / "out")
        return model, tmp_path / "out"

    return make


def test_logits_are_those_of_the_numbers_that_codes_stand_for(family: str, tiny: Callable[..., Any]) -> None:
    dense = tiny(family)
    coded = deepcopy(dense)
    tied = coded.get_output_embeddings().weight is coded.get_input_embeddings().weight
    names = code_embeddings(coded)
    assert len(names) == 2 - tied
    assert isinstance(coded.get_input_embeddings(), CodedEmbedding)
    assert isinstance(coded.get_output_embeddings(), TiedHead if tied else QuantisedLinear)
    expected, before = twin(coded, dense)(IDS).logits, dense(IDS).logits
    torch.testing.assert_close(coded(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert 0 < (expected - before).norm() / before.norm() < 0.02
    assert code_embeddings(coded) == names  # nothing is rounded twice
    torch.testing.assert_close(coded(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_keeps_them(family: str, saved: Callable[..., tuple[Any, Path]], tmp_path: Path) -> None:
    model, folder = saved(family)
    tensors = load_file(folder / "model.safetensors")
    vocabulary = model.config.vocab_size
    assert not any(
        t.is_floating_point() and t.shape[:1] == (vocabulary,) and t.shape[1:] > (1,) for t in tensors.values()
    )
    assert sum(name.endswith("weight_int8") for name in tensors) == len(find_ends(model))
    assert verify(folder) >= 3
    plan, _ = open_checkpoint(folder)
    assert plan.total_bytes == tensor_bytes(model)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    again.save_pretrained(tmp_path / "again")
    resaved = load_file(tmp_path / "again" / "model.safetensors")
    assert resaved.keys() == tensors.keys()
    assert all(torch.equal(tensor, resaved[name]) for name, tensor in tensors.items())
    assert open_checkpoint(tmp_path / "again")[0].embeddings == plan.embeddings


def test_casts_leave_codes_alone(saved: Callable[..., tuple[Any, Path]]) -> None:
    model, folder = saved("llama")
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    table, other = (m.get_input_embeddings() for m in (model, half))
    assert (other.weight_int8.dtype, other.weight_scale.dtype) == (torch.int8, torch.bfloat16)
    assert other(IDS).dtype == torch.bfloat16
    assert torch.equal(table.weight_int8, other.weight_int8)
    cast = deepcopy(table).to(torch.float16)
    assert (cast.weight_int8.dtype, cast.weight_scale.dtype) == (torch.int8, torch.bfloat16)
    assert cast(IDS).dtype == torch.float16
    assert half.get_output_embeddings().embedding is half.get_input_embeddings()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mistral"])
def test_the_runtime_says_the_same_tokens(family: str, saved: Callable[..., tuple[Any, Path]], tokenizer: Any) -> None:
    model, folder = saved(family)
    tokenizer.save_pretrained(folder)
    llm = rankwise.LLM(str(folder), device="cpu", max_model_len=64, kv_tokens=256)
    asked = rankwise.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    for prompt in IDS.tolist():
        said = llm.generate(prompt, asked)[0].tokens
        logits = model(torch.tensor([prompt + said])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == said
    assert llm.engine.decoder.coded is not None  # fp32: no panels


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_in_bf16_a_tied_table_is_there_once(family: str, saved: Callable[..., tuple[Any, Path]]) -> None:
    model, _ = saved(family, torch.bfloat16)
    table = model.get_input_embeddings().table()
    tied, rows = isinstance(model.get_output_embeddings(), TiedHead), model.get_input_embeddings()(IDS[0])
    decoder = convert(model, 64)
    assert not len(decoder.embed)
    if isinstance(decoder.head, HostGroup):  # where gcc made the functions
        assert (decoder.coded is None) == tied
        if tied:
            assert torch.equal(take_rows(decoder.head.firsts[0].panels, IDS[0]), rows)
    else:
        assert (decoder.coded is decoder.head) == tied
    assert torch.equal(rows, dequantize_int8(table, torch.bfloat16)[IDS[0]])


def test_rows_of_panels() -> None:
    weight = torch.randn(37, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 36, 5, 5, 16, 31])
    coded = quantize_int8(weight)
    assert torch.equal(take_rows(panels_of(coded), ids), dequantize_int8(coded, torch.bfloat16)[ids])
    assert torch.equal(take_rows(panels_of(weight.bfloat16()), ids), weight.bfloat16()[ids])


def test_what_is_wrong_is_named(saved: Callable[..., tuple[Any, Path]], tiny: Callable[..., Any]) -> None:
    _, folder = saved("llama")
    with pytest.raises(RankwiseError, match=r"^embeddings: int3; allowed: int8"):
        code_embeddings(tiny("llama"), "int3")
    other = tiny("llama")
    other.set_input_embeddings(torch.nn.EmbeddingBag(512, 32))
    with pytest.raises(RankwiseError, match=r"^embeddings: EmbeddingBag; allowed: "):
        code_embeddings(other)
    plan = RankPlan({n: replace(s, kind="dense", rank=s.full_rank) for n, s in RankPlan.load(folder / "plan.json")})
    plan.embeddings = {"lm_head": "int8"}
    with pytest.raises(RankwiseError, match=r"^embeddings: lm_head; allowed: this model's"):
        rankwise.compress(tiny("llama"), plan)
    written = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(written | {"embeddings": {"model.embed_tokens": "int2"}}))
    with pytest.raises(RankwiseError, match=r"embeddings: .*allowed: module names, each with int8"):
        open_checkpoint(folder)
    (folder / "plan.json").write_text(json.dumps({k: v for k, v in written.items() if k != "embeddings"}))
    with pytest.raises(RankwiseError, match=r"contradicts config\.json"):
        open_checkpoint(folder)


def test_a_missing_part_is_found(saved: Callable[..., tuple[Any, Path]]) -> None:
    _, folder = saved("qwen2")
    tensors = load_file(folder / "model.safetensors")
    scale = tensors.pop("lm_head.weight_scale")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for open_it in (open_checkpoint, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(RankwiseError, match=r"^lm_head.weight_scale: (missing|not in the checkpoint)"):
            open_it(folder)
    save_file(tensors | {"lm_head.weight_scale": scale[1:]}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RankwiseError, match=r"^lm_head.weight_scale: shape \[511, 1\]"):
        open_checkpoint(folder)
