"""`rankwise import`: folders of bitsandbytes' nf4 become checkpoints with the same codes and the same logits."""

import hashlib
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bnbfolder import save, small_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rankwise
from rankwise import imports
from rankwise.cli import main
from rankwise.engine.checkpoint import open_checkpoint, shard_files, verify
from rankwise.errors import RankwiseError
from rankwise.imports import import_folder

IDS = torch.randint(2, 512, (3, 40), generator=torch.Generator().manual_seed(0))
BLOCK = "model.layers.0."
Q = f"{BLOCK}self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def without_bitsandbytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may import it, but the test of it."""
    if "bitsandbytes" not in request.node.name:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in shard_files(folder) for name, tensor in load_file(path).items()}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in tensors(folder).values())


@pytest.fixture
def source(tmp_path: Path, tokenizer: Any) -> Path:
    """Double quantisation."""
    save(small_model(), tokenizer, tmp_path / "source", double=True)
    return tmp_path / "source"


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_same_codes_and_same_logits(family: str, double: bool, tmp_path: Path, tokenizer: Any) -> None:
    meant = save(small_model(family), tokenizer, tmp_path / "source", double=double)
    plan = import_folder(str(tmp_path / "source"), tmp_path / "out")
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    for name, spec in plan:
        assert str(spec.precision) == "nf4"
        codes = after.pop(f"{name}.weight_nf4")
        assert codes.shape == (spec.out_features, spec.in_features // 2)
        assert torch.equal(codes.flatten(), before.pop(f"{name}.weight").flatten())
        absmax = after.pop(f"{name}.weight_absmax")
        assert absmax.dtype == torch.float32
        assert double or torch.equal(absmax.flatten(), before[f"{name}.weight.absmax"])
        assert after.pop(f"{name}.weight").shape == (1,)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert after.keys() == {name for name in before if ".weight." not in name}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, meant(IDS).logits)
    assert open_checkpoint(tmp_path / "out")[0] == plan
    assert plan.total_bytes == tensor_bytes(tmp_path / "out")
    assert verify(tmp_path / "out") >= 6
    facts = {"model": str(tmp_path / "source"), "quant_method": "bitsandbytes"}
    assert plan.provenance["imported"] == facts | {"double_quantised": len(plan.layers) * double}
    assert not (tmp_path / ".out.rankwise").exists()


def test_our_runtime_runs_it(source: Path, tmp_path: Path) -> None:
    import_folder(str(source), tmp_path / "out")
    llm = rankwise.LLM(str(tmp_path / "out"), dtype="fp32", device="cpu", max_model_len=64, kv_tokens=256)
    params = rankwise.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    [done] = llm.generate(IDS[0, :20].tolist(), params)
    model, _ = rankwise.load_model(str(tmp_path / "out"), "fp32")
    logits = model(torch.tensor([IDS[0, :20].tolist() + done.tokens])).logits[0]
    assert done.tokens == logits[19:-1].argmax(-1).tolist()


def test_skipped_layers_stay(tmp_path: Path, tokenizer: Any) -> None:
    skip = [f"{BLOCK}mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    meant = save(small_model(dtype=torch.bfloat16), tokenizer, tmp_path / "source", double=True, skip=skip)
    plan = import_folder(str(tmp_path / "source"), tmp_path / "out")
    assert {name for name, spec in plan if not spec.quantised} == set(skip)
    assert {str(plan.layers[name].precision) for name in skip} == {"bf16"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name in (*skip, "lm_head", "model.embed_tokens"):
        assert torch.equal(loaded.get_submodule(name).weight, meant.get_submodule(name).weight)
    assert loaded.get_submodule(f"{BLOCK}self_attn.q_proj").weight.dtype == torch.bfloat16
    assert torch.equal(loaded(IDS).logits, meant(IDS).logits)


def test_shards_may_part_what_belongs_together(source: Path, tmp_path: Path, tokenizer: Any) -> None:
    save(small_model(), tokenizer, tmp_path / "parted", double=True, shards=3)
    import_folder(str(source), tmp_path / "one")
    plan = import_folder(str(tmp_path / "parted"), tmp_path / "three")
    one, three = tensors(tmp_path / "one"), tensors(tmp_path / "three")
    assert len(shard_files(tmp_path / "three")) == 3
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == tensor_bytes(tmp_path / "three") == plan.total_bytes
    assert index["weight_map"].keys() == three.keys()


def test_interrupted_it_goes_on(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save(small_model(), tokenizer, tmp_path / "source", double=True, shards=3)
    import_folder(str(tmp_path / "source"), tmp_path / "whole")
    written: list[Path] = []

    def stopped(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    write = imports.write_tensors
    with monkeypatch.context() as patch:
        patch.setattr(imports, "write_tensors", stopped)
        with pytest.raises(KeyboardInterrupt):
            import_folder(str(tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    times = [path.stat().st_mtime_ns for path in written]
    with pytest.raises(RankwiseError, match="holds unfinished work with other import"):
        import_folder(f"{tmp_path}/./source", tmp_path / "out")
    import_folder(str(tmp_path / "source"), tmp_path / "out")
    assert times == [(tmp_path / "out" / path.name).stat().st_mtime_ns for path in written]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not (tmp_path / ".out.rankwise").exists()


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def quantised_head(stored: dict[str, torch.Tensor]) -> None:
    parts = {name: tensor for name, tensor in stored.items() if name.startswith(Q)}
    stored |= {name.replace(Q, "lm_head.weight"): tensor.clone() for name, tensor in parts.items()}


def dense(stored: dict[str, torch.Tensor]) -> None:
    for name in [name for name in stored if "quant_state" in name]:
        del stored[name]


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "8-bit": (
        edited(lambda c: c["quantization_config"].update(load_in_8bit=True, load_in_4bit=False)),
        ("load_in_8bit: True (source);", "allowed: load_in_4bit with bnb_4bit_quant_type nf4"),
    ),
    "fp4": (
        edited(lambda c: c["quantization_config"].update(bnb_4bit_quant_type="fp4")),
        ("bnb_4bit_quant_type: fp4 (source);", "allowed: nf4"),
    ),
    "dense": (edited(lambda c: c.pop("quantization_config")), ("quant_method: None (source);", "bitsandbytes")),
    "no-config": (lambda folder: (folder / "config.json").unlink(), ("model: source (no config.json in it)",)),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), ("source/model.safetensors",)),
    "cut": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:100_000]
        ),
        ("source/model.safetensors: ", "truncated or not safetensors"),
    ),
    "nothing-in-4-bits": (changed(dense), ("model: source (no tensors in 4 bits);", "nf4")),
    "codes-without-state": (
        changed(lambda t: t.pop(f"{Q}.quant_state.bitsandbytes__nf4")),
        (f"{Q}: U8 without quant_state;", "allowed: nf4, BF16, F16, F32"),
    ),
    "no-absmax": (changed(lambda t: t.pop(f"{Q}.absmax")), (f"{Q}.absmax: missing;",)),
    "no-codes": (changed(lambda t: t.pop(Q)), (f"{Q}: missing;",)),
    "no-layer": (
        changed(lambda t: [t.pop(name) for name in list(t) if name.startswith(Q)]),
        (f"{Q}: missing;",),
    ),
    "no-norm": (changed(lambda t: t.pop("model.norm.weight")), ("norm.weight: not in the checkpoint;",)),
    "no-bias": (
        changed(lambda t: t.pop(Q.replace("weight", "bias"))),
        ("layers.0.self_attn.q_proj.bias: not in the checkpoint;",),
    ),
    "another-shape": (
        edited(lambda c: c.update(hidden_size=128, head_dim=16)),
        (f"{Q}: shape: [64, 64]; the model has [64, 128]",),
    ),
    "quantised-head": (
        changed(quantised_head),
        ("lm_head.weight: nf4;", "linear layers of decoder blocks; save it with llm_int8_skip_modules"),
    ),
    "unknown-model": (edited(lambda c: c.update(model_type="magic")), ("model: source (", "transformers knows")),
    "no-decoder": (
        edited(lambda c: c.update(model_type="t5", architectures=["T5ForConditionalGeneration"])),
        ("model: ", "causal language model"),
    ),
}


@pytest.mark.parametrize(("damage", "parts"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(
    damage: Callable[[Path], None],
    parts: tuple[str, ...],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(source)
    monkeypatch.chdir(source.parent)
    with pytest.raises(SystemExit) as ended:
        main(["import", "source", "--out", "out"])
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [part for part in parts if part not in line] == [], line
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_the_command(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for code in (0, 2):  # the second time there is something
        with pytest.raises(SystemExit) as ended:
            main(["import", str(source), "--out", str(tmp_path / "out"), "--json"])
        assert ended.value.code == code
    out, err = capfd.readouterr()
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    facts = {"out": str(tmp_path / "out"), "ratio": 1.0, "bits": 4.5, "bytes": size, "nf4": 14}
    assert json.loads(out) == facts
    assert "14 of 14 linear layers in nf4" in err
    assert f"error: out: {tmp_path / 'out'}; allowed: a folder that does not exist yet" in err
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"100.0% of the parameters of the linear layers of `{source}` are kept. Stored as nf4." in card


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed, so transformers loads it")
@pytest.mark.parametrize("command", [["eval", "--text", "t.txt"], ["generate", "a"], ["compress", "--out", "out"]])
def test_other_commands_say_what_is_needed(
    command: list[str], source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(source.parent)
    Path("t.txt").write_text("A text. " * 500)
    with pytest.raises(SystemExit) as ended:
        main([command[0], "source", *command[1:]])
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (2, "")
    reason = "model: source (stored by bitsandbytes, which is not installed)"
    assert err.splitlines()[-1] == f"error: {reason}; pip install bitsandbytes; nf4 also: rankwise import"


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_folder_that_bitsandbytes_made(double: bool, tmp_path: Path, tokenizer: Any) -> None:
    """Codes, numbers and logits are bitsandbytes' own."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    small_model().save_pretrained(tmp_path / "dense")
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    where = {"quantization_config": wanted, "device_map": "cpu", "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **where)
    theirs.save_pretrained(tmp_path / "source")
    save(small_model(), tokenizer, tmp_path / "written", double=double)
    real, written = tensors(tmp_path / "source"), tensors(tmp_path / "written")
    kinds = [{n: (t.dtype, t.shape) for n, t in found.items() if "state" not in n} for found in (real, written)]
    assert kinds[0] == kinds[1]
    import_folder(str(tmp_path / "source"), tmp_path / "out")
    mine, twin = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), small_model()
    for name, layer in theirs.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            numbers = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            twin.get_submodule(name).weight.copy_(numbers)
    assert torch.equal(mine(IDS).logits, twin(IDS).logits)
    assert torch.equal(mine(IDS).logits, theirs.train()(IDS).logits)
