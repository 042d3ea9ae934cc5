"""Names and paths into models: what loads, what is refused, and GGUF files against what was written into them."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rankwise import zoo
from rankwise.errors import RankwiseError
from rankwise.evaluate import perplexity
from rankwise.files import cache_folder
from rankwise.jobs import locked
from rankwise.text import read_text, take_windows, token_windows
from rankwise.zoo import (
    disk_bytes,
    embedded_gguf,
    load_model,
    local_folder,
    model_dtype,
    resolve_device,
)

WINDOWS = torch.randint(2, 512, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted models; tests of the embedded model share the user's."""
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_folder_loads_as_it_was_saved(
    family: str, model_folder: Callable[[str], Path], tiny: Callable[..., Any]
) -> None:
    model, tokenizer = load_model(str(model_folder(family)))
    assert torch.equal(model(WINDOWS).logits, tiny(family)(WINDOWS).logits)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    text = "The value of 12 keys"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", None)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_dtype(
    dtype: str, expected: Any, stored: torch.dtype, tiny: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    tiny("llama", dtype=stored).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    as_stored, _ = load_model(str(tmp_path / "model"))
    assert {p.dtype for p in as_stored.parameters()} == {stored}
    model, _ = load_model(str(tmp_path / "model"), dtype)
    assert {p.dtype for p in model.parameters()} == {expected or torch.float32}
    assert model_dtype(model) == dtype
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, as_stored.model.layers[0].mlp.up_proj.weight.to(weight.dtype))


@pytest.mark.parametrize("dtype", ["int8", "float32", "", "BF16"])
def test_an_unknown_dtype_is_refused(dtype: str, model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(RankwiseError, match="auto, bf16, fp16, fp32") as raised:
        load_model(str(model_folder("llama")), dtype)
    assert (raised.value.field, raised.value.value) == ("dtype", dtype)


def test_a_model_in_fp64_has_no_short_name(tiny: Callable[..., Any]) -> None:
    with pytest.raises(RankwiseError, match=r"dtype: torch.float64; allowed: bf16, fp16, fp32; load with --dtype"):
        model_dtype(tiny("llama", dtype=torch.float64))


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu,cuda", "", "meta", "mps"])
def test_what_is_no_device_here_is_refused(device: str) -> None:
    with pytest.raises(RankwiseError, match="allowed: auto, cpu, cuda, cuda:N") as raised:
        resolve_device(device)
    assert (raised.value.field, raised.value.value) == ("device", device)


def test_devices_of_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for device in ("cuda", "cuda:0"):
        with pytest.raises(RankwiseError, match=f"device: {device}; not on this machine"):
            resolve_device(device)


def test_devices_of_a_machine_with_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(RankwiseError, match="device: cuda:7; not on this machine"):
        resolve_device("cuda:7")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("a/b/c", "no such folder"),
        ("~/nowhere", "no such folder"),
        ("nowhere.gguf", "no such file"),
        ("embedded:gpt-7", "embedded:gpt-7"),
    ],
)
def test_missing_files_are_named(source: str, reason: str) -> None:
    with pytest.raises(RankwiseError, match=reason) as raised:
        load_model(source)
    assert raised.value.field == "model"
    assert source in str(raised.value)
    assert "a hub id, a folder with config.json, a .gguf file or embedded:smollm2-135m" in raised.value.allowed


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "no config.json in it"),
        ("not json", "not.*valid JSON|not a valid JSON|Expecting value|JSON"),
        ("{}", "model_type|Unrecognized"),
        ('{"model_type": "no-such-architecture"}', "no-such-architecture"),
    ],
    ids=["none", "no-json", "no-type", "unknown-type"],
)
def test_a_folder_of_junk_is_refused(config: str | None, reason: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(RankwiseError, match=reason) as raised:
        load_model(str(tmp_path))
    assert raised.value.field == "model"
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RankwiseError, match=r"model: nobody/no-such-model \(\w+: .+\); allowed: a hub id") as raised:
        load_model("nobody/no-such-model")
    assert "\n" not in str(raised.value)
    assert local_folder("nobody/no-such-model") is None
    assert disk_bytes("nobody/no-such-model") is None


@pytest.fixture
def copy(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Llama's folder, to damage."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "copy"))


@pytest.mark.parametrize("change", ["missing", "shape", "truncated", "no-weights"])
def test_damaged_weights_are_never_replaced_by_random_ones(change: str, copy: Path) -> None:
    shard, name = copy / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    stored = load_file(shard)
    if change == "missing":
        del stored[name]
    elif change == "shape":
        stored[name] = stored[name][:-1].clone()
    save_file(stored, shard, metadata={"format": "pt"})
    if change == "truncated":
        shard.write_bytes(shard.read_bytes()[:-9])
    if change == "no-weights":
        shard.unlink()
    with pytest.raises(RankwiseError) as raised:
        load_model(str(copy))
    assert raised.value.field == "model"
    assert str(copy) in str(raised.value)
    if change == "missing":
        assert f"missing keys: {name}" in str(raised.value)


def test_tensors_of_a_layer_that_config_does_not_list(copy: Path) -> None:
    stored = load_file(copy / "model.safetensors") | {"model.layers.0.mlp.up_proj.lowrank_u": torch.zeros(48, 3)}
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RankwiseError, match=r"up_proj.lowrank_u; its layer is not in config.json"):
        load_model(str(copy))


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_damaged_tokenizer_is_named(damage: str, copy: Path) -> None:
    path = copy / "tokenizer.json"
    if damage == "truncated":
        path.write_text(path.read_text()[:1000])
    else:
        path.unlink()
        (copy / "tokenizer_config.json").unlink()
    with pytest.raises(RankwiseError, match="the folder must hold the model's tokenizer files") as raised:
        load_model(str(copy))
    assert raised.value.field == "tokenizer"
    assert str(copy) in str(raised.value)


def test_where_converted_models_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("RANKWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "rankwise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "rankwise"


def test_bytes_on_disk(copy: Path, tiny: Callable[..., Any], tmp_path: Path) -> None:
    assert disk_bytes(str(copy)) == (copy / "model.safetensors").stat().st_size
    tiny("llama").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shards = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    assert disk_bytes(str(tmp_path / "shards")) == sum(path.stat().st_size for path in shards)
    (tmp_path / "empty").mkdir()
    assert disk_bytes(str(tmp_path / "empty")) is None


# ---------------------------------------------------------------------------------------------------- GGUF


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rotary halves within each head of q and k."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: Any, tokenizer: Any, pre: str) -> None:
    """A Llama as llama.cpp would write it, in F32."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(backend["vocab"], key=backend["vocab"].get))
    writer.add_token_types([3, 3, *[1] * (len(backend["vocab"]) - 2)])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    tensors = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    if not config.tie_word_embeddings:
        tensors["output"] = model.lm_head.weight
    for number, block in enumerate(model.model.layers):
        for ours, theirs in GGUF_NAMES.items():
            weight = block.get_submodule(ours).weight
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            tensors[f"blk.{number}.{theirs}"] = interleaved(weight, heads) if heads else weight
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def kept_in(cache: Path) -> list[Path]:
    """Everything in the cache but its lock."""
    return [path for path in cache.iterdir() if path.name != ".lock"]


@pytest.fixture
def gguf_file(tiny: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"), tokenizer, "smollm")
    return tmp_path / "tiny.gguf"


def test_gguf_holds_what_was_written(gguf_file: Path, tiny: Callable[..., Any], tokenizer: Any) -> None:
    model, found = load_model(str(gguf_file), "fp32")
    written = tiny("llama")
    state = model.state_dict()
    for name, tensor in written.state_dict().items():
        assert torch.equal(state[name], tensor), name
    torch.testing.assert_close(model(WINDOWS).logits, written(WINDOWS).logits)
    text = "The value of the expression"
    assert found(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.decode(found(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "bf16"), ("fp16", "fp16"), ("fp32", "fp32")])
def test_gguf_dtype(dtype: str, expected: str, gguf_file: Path) -> None:
    assert model_dtype(load_model(str(gguf_file), dtype)[0]) == expected


@pytest.mark.parametrize(("pre", "tokens"), [("smollm", ["1", "2"]), ("default", ["12"])])
def test_digits_are_split_where_the_file_says_so(
    pre: str, tokens: list[str], tiny: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary["12"] = vocabulary.pop(last)  # a vocabulary that knows a number, as those of old models do
    merges[:] = [["1", "2"], *(pair for pair in merges if "".join(pair) != last)]
    knows_12 = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))
    assert knows_12.tokenize("12") == ["12"]
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"), knows_12, pre)
    _, found = load_model(str(tmp_path / "tiny.gguf"))
    assert found.tokenize("12") == tokens


def test_loading_is_quiet(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(gguf_file), "fp32")
    assert capfd.readouterr() == ("", "")


def test_gguf_is_converted_once(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = load_model(str(gguf_file), "fp32")
    (converted,) = kept_in(cache)
    assert local_folder(str(gguf_file), "fp32") == converted
    assert disk_bytes(str(gguf_file), "fp32") == (converted / "model.safetensors").stat().st_size

    def again(*_: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(zoo, "_convert_gguf", again)
    second, _ = load_model(str(gguf_file), "fp32")
    assert torch.equal(first(WINDOWS).logits, second(WINDOWS).logits)


def test_a_changed_gguf_is_converted_anew(
    gguf_file: Path, cache: Path, tiny: Callable[..., Any], tokenizer: Any
) -> None:
    load_model(str(gguf_file), "fp32")
    write_gguf(gguf_file, tiny("llama", seed=1), tokenizer, "smollm")
    model, _ = load_model(str(gguf_file), "fp32")
    assert torch.equal(model(WINDOWS).logits, tiny("llama", seed=1)(WINDOWS).logits)
    assert len(kept_in(cache)) == 2


def test_whoever_comes_second_waits_for_the_first(
    gguf_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process owns the cache and converts the same file; its folder is taken, and nothing converted."""
    first, _ = load_model(str(gguf_file), "fp32")
    (converted,) = kept_in(cache)
    aside = converted.rename(tmp_path / "aside")
    monkeypatch.setattr(zoo, "_convert_gguf", lambda *_: pytest.fail("converted again"))
    with ThreadPoolExecutor(1) as pool:
        with locked(cache):
            second = pool.submit(load_model, str(gguf_file), "fp32")
            time.sleep(0.3)
            assert not second.done()
            aside.rename(converted)
        assert torch.equal(second.result(timeout=60)[0](WINDOWS).logits, first(WINDOWS).logits)
    assert kept_in(cache) == [converted]


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated"])
def test_a_damaged_gguf_is_refused_and_leaves_nothing(damage: str, gguf_file: Path, cache: Path) -> None:
    raw = gguf_file.read_bytes()
    content = {"garbage": b"GARBAGE" * 100, "empty": b"", "truncated": raw[: len(raw) // 2]}[damage]
    gguf_file.write_bytes(content)
    with pytest.raises(RankwiseError, match="a GGUF file of a causal language model is expected") as raised:
        load_model(str(gguf_file))
    assert str(gguf_file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not cache.exists() or kept_in(cache) == []


@pytest.mark.real
def test_the_embedded_model() -> None:
    model, tokenizer = load_model("embedded:smollm2-135m")
    assert model_dtype(model) == "bf16"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert embedded_gguf().suffix == ".gguf"
    ids = tokenizer("1234", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["1", "2", "3", "4"]
    spaced = tokenizer("a  2", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(spaced) == ["a", "ĠĠ", "2"]
    source = "embedded:python-docs-test"
    windows = take_windows(token_windows(read_text(source), tokenizer, 512), 4, source)
    assert 2 < perplexity(model, windows) < 40
