"""The transformers door: plain `from_pretrained` opens a checkpoint, and never fills a gap with random numbers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2LMHeadModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import rankwise
from rankwise.anatomy import block_linears
from rankwise.engine.doors import hf
from rankwise.engine.layers import LowRankLinear, PivotLinear
from rankwise.errors import RankwiseError
from rankwise.plan import LayerSpec, RankPlan
from rankwise.zoo import load_model

WINDOWS = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))
KINDS = ("lowrank", "pivot", "dense")
CLASSES = {"lowrank": LowRankLinear, "pivot": PivotLinear, "dense": nn.Linear}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], tokenizer: Any) -> Any:
    """Folder, plan and model in memory of one checkpoint that holds every kind, with and without biases."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("qwen2")).eval().requires_grad_(False)
    plan = rankwise.allocate(model, WINDOWS, rankwise.Global(ratio=0.6, rank_multiple=1))
    for number, (name, spec) in enumerate(list(plan)):
        kind, m, n = KINDS[number % 3], spec.out_features, spec.in_features
        rank = min(m, n) if kind == "dense" else min(m, n) // 3
        plan.layers[name] = LayerSpec(kind, m, n, rank, spec.weights)
    small = rankwise.compress(model, plan)
    return rankwise.save(small, tokenizer, plan, tmp_path_factory.mktemp("made") / "small"), plan, small


@pytest.fixture
def folder(made: Any, tmp_path: Path) -> Path:
    """A copy to damage, without what transformers does not read."""
    skip = shutil.ignore_patterns("plan.json", "SHA256SUMS")
    return Path(shutil.copytree(made[0], tmp_path / "copy", ignore=skip))


def change_tensor(folder: Path, name: str, new: torch.Tensor | None) -> None:
    """Rewrite the shard with one tensor replaced or left out."""
    stored = load_file(folder / "model.safetensors")
    assert name in stored
    stored = {key: t for key, t in stored.items() if key != name} | ({} if new is None else {name: new})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def first(folder: Path, ending: str) -> str:
    """The first tensor whose name ends so."""
    return min(name for name in load_file(folder / "model.safetensors") if name.endswith(ending))


def test_layers_are_what_the_plan_says(made: Any) -> None:
    folder, plan, small = made
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, spec in plan:
        assert type(model.get_submodule(name)) is CLASSES[spec.kind], name
    assert {spec.kind for _, spec in plan} == set(KINDS)
    assert torch.equal(model(WINDOWS).logits, small(WINDOWS).logits)
    assert not model.training
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"attn_implementation": "eager"}], ids=["map", "eager"])
def test_other_ways_to_load(options: dict[str, str], made: Any) -> None:
    folder, _, small = made
    logits = AutoModelForCausalLM.from_pretrained(folder, **options)(WINDOWS).logits
    torch.testing.assert_close(logits, small(WINDOWS).logits, rtol=1e-4, atol=1e-5)


def test_config_survives_on_its_own(made: Any, tmp_path: Path) -> None:
    folder, plan, _ = made
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["layers"].keys() == plan.compressed.keys()
    assert config["format"] == 1


TENSORS = [
    "q_proj.lowrank_u",
    "q_proj.lowrank_v",
    "q_proj.bias",
    "q_proj.weight",
    "k_proj.pivot_index",
    "k_proj.pivot_basis",
    "k_proj.pivot_coeff",
    "v_proj.weight",
    "input_layernorm.weight",
    "embed_tokens.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("ending", TENSORS)
def test_a_missing_tensor_is_never_made_up(ending: str, folder: Path) -> None:
    name = first(folder, ending)
    change_tensor(folder, name, None)
    with pytest.raises(Exception, match=name.removeprefix("model.")):  # of any class, but with the tensor's name
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("ending", TENSORS)
def test_a_wrong_shape_is_never_accepted(ending: str, folder: Path) -> None:
    name = first(folder, ending)
    tensor = load_file(folder / "model.safetensors")[name]
    change_tensor(folder, name, torch.cat([tensor, tensor[:1]]))
    with pytest.raises(Exception, match=r"shape|mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.999], ids=["empty", "head", "tail"])
def test_a_truncated_shard_is_never_accepted(share: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(RankwiseError, match=r"model.safetensors: .*truncated or not safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("ending", ["k_proj.pivot_coeff", "q_proj.bias", "v_proj.weight", "input_layernorm.weight"])
def test_the_body_alone_is_checked_too(ending: str, folder: Path) -> None:
    """The head is left over then, and must not make up for what is missing."""
    name = first(folder, ending)
    change_tensor(folder, name, None)
    with pytest.raises(Exception, match=name.removeprefix("model.")):
        AutoModel.from_pretrained(folder)


def test_a_left_over_tensor_does_not_make_up_for_a_missing_one(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.0.input_layernorm.old"] = stored.pop("model.layers.0.input_layernorm.weight")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"layers.0.input_layernorm.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, r"config.json: format 2; this version reads format 1: upgrade rankwise"),
        ("format", 0, r"config.json: format 0; this version reads format 1: write it again"),
        ("rank", 7, r"lowrank_u: shape \[32, 10\]; the plan says shape \[32, 7\]"),
        ("rank", 400, r"config.json: model.*q_proj.rank: 400; allowed: 1 to 32"),
        ("kind", "tucker", r"config.json: model.*q_proj.kind: tucker; allowed: dense, lowrank, pivot"),
        ("kind", "pivot", r"q_proj.pivot_index: missing; the plan says shape"),
        ("out_features", 64, r"q_proj.lowrank_u: shape"),
        ("bits", 3, r"config.json: model.*q_proj: .*unexpected keyword argument 'bits'"),
    ],
    ids=["newer", "older", "rank", "rank-too-large", "kind-unknown", "kind-other", "shape", "field-unknown"],
)
def test_an_edited_config_is_refused(key: str, value: Any, message: str, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    ours = config["quantization_config"]
    entry = ours if key == "format" else ours["layers"]["model.layers.0.self_attn.q_proj"]
    entry[key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(RankwiseError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_left_out_of_the_config_does_not_pass(folder: Path) -> None:
    """Then transformers builds a dense layer there, and the guard's shape stops it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["layers"]["model.layers.0.self_attn.q_proj"]
    path.write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"mismatch|shape"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(RankwiseError):
        load_model(str(folder))


WITHOUT_RANKWISE = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    for auto in (AutoModelForCausalLM, AutoModel):
        try:
            auto.from_pretrained(folder)
        except Exception as error:
            print("refused", "mismatch" in str(error))
        else:
            print("loaded", folder)
assert not any(name.split(".")[0] == "rankwise" for name in sys.modules)
"""


def test_without_rankwise_transformers_stops(made: Any, tiny: Callable[..., Any], tmp_path: Path) -> None:
    folders = [made[0]]
    for kind in ("lowrank", "pivot"):
        model = tiny("llama")
        plan = rankwise.allocate(model, WINDOWS, rankwise.Global(ratio=0.5, kinds=(kind,), rank_multiple=1))
        small = rankwise.compress(model, plan)
        folders.append(rankwise.save(small, None, plan, tmp_path / kind))
    model = tiny("llama")  # one layer alone, and the smallest change there is
    plan = rankwise.allocate(model, WINDOWS, rankwise.Global(ratio=1.0))
    for number, name in enumerate(list(plan.layers)):
        if number == 3:
            plan.layers[name] = LayerSpec("pivot", 32, 32, 31, "fp32")
    folders.append(rankwise.save(rankwise.compress(model, plan), None, plan, tmp_path / "one"))
    command = [sys.executable, "-c", WITHOUT_RANKWISE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["refused True"] * 8


def test_replace_layers_refuses_what_does_not_fit(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    spec = LayerSpec("lowrank", 32, 32, 4, "fp32")
    with pytest.raises(RankwiseError, match="no such module; the plan does not fit LlamaForCausalLM") as raised:
        hf.replace_layers(model, {"model.layers.9.self_attn.q_proj": spec})
    assert raised.value.field == "model.layers.9.self_attn.q_proj"
    with pytest.raises(RankwiseError, match=r"\[out, in\] = \[16, 32\] in the model; the plan says \[32, 32\]"):
        hf.replace_layers(model, {"model.layers.0.self_attn.k_proj": spec})


@pytest.mark.parametrize("name", ["model.layers.0", "model.norm", "model.layers.0.self_attn"])
def test_replace_layers_refuses_what_is_no_linear_layer(name: str, tiny: Callable[..., Any]) -> None:
    with pytest.raises(RankwiseError) as raised:
        hf.replace_layers(tiny("llama"), {name: LayerSpec("lowrank", 32, 32, 4, "fp32")})
    assert raised.value.field == name


def test_replace_layers_keeps_bias_and_dtype(tiny: Callable[..., Any]) -> None:
    """GPT-2's Conv1D stores the weight transposed; the layer in its place must not."""
    model: GPT2LMHeadModel = tiny("gpt2", dtype=torch.bfloat16)
    names = list(block_linears(model)[0])
    hf.replace_layers(model, {names[0]: LayerSpec("lowrank", 96, 32, 4, "bf16")})
    layer = model.get_submodule(names[0])
    assert isinstance(layer, LowRankLinear)
    assert layer.lowrank_u.shape == (96, 4)
    assert layer.lowrank_u.dtype == torch.bfloat16
    assert layer.lowrank_u.is_meta
    assert layer.bias is not None
    assert layer.bias.shape == (96,)


def test_attach_lets_transformers_save(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    plan = rankwise.allocate(model, WINDOWS, rankwise.Uniform(ratio=0.6, rank_multiple=1))
    small = rankwise.compress(model, plan)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(WINDOWS).logits, small(WINDOWS).logits)
    assert loaded.hf_quantizer.is_trainable
    assert loaded.hf_quantizer.is_serializable()
    assert loaded.hf_quantizer.is_compileable


def test_a_dense_model_is_not_quantised_on_the_fly(model_folder: Callable[[str], Path]) -> None:
    config = hf.RankwiseQuantizationConfig()
    with pytest.raises(ValueError, match=r"calibration|pre-quantized|prequantized"):
        AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=config)


def test_registering_twice_changes_nothing() -> None:
    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    hf.register()
    assert (dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
    assert AUTO_QUANTIZER_MAPPING["rankwise"] is hf.RankwiseQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["rankwise"] is hf.RankwiseQuantizationConfig


def test_plan_of_a_loaded_model_is_that_of_its_folder(made: Any) -> None:
    folder, plan, _ = made
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    entries = loaded.config.quantization_config.to_dict()
    assert RankPlan.from_dict({"format": 1, "layers": entries["layers"]}).counts() == plan.counts() | {"dense": 0}
