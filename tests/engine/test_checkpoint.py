"""A checkpoint folder: whole or absent, checked by other people's tools, readable after others rewrote it."""

import copy
import errno
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import rankwise
from rankwise.cli import main
from rankwise.engine import checkpoint
from rankwise.engine.checkpoint import (
    check_headers,
    config_entry,
    folder_bytes,
    is_rankwise,
    open_checkpoint,
    save,
    shapes_on_disk,
    shard_files,
    specs_from_config,
    verify,
)
from rankwise.errors import RankwiseError
from rankwise.plan import LayerSpec, RankPlan

WINDOWS = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))
KINDS = ("lowrank", "pivot", "dense")


def mixed_plan(model: Any) -> RankPlan:
    """Kinds in turn, so that every kind is there with and without a bias."""
    plan = rankwise.allocate(model, WINDOWS, rankwise.Global(ratio=0.6, rank_multiple=1))
    for number, (name, spec) in enumerate(list(plan)):
        kind, m, n = KINDS[number % 3], spec.out_features, spec.in_features
        rank = min(m, n) if kind == "dense" else min(m, n) // 3
        plan.layers[name] = LayerSpec(kind, m, n, rank, spec.weights)
    plan.provenance["model"] = "somebody/qwen"
    return plan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], tokenizer: Any) -> Any:
    """Folder, plan and model in memory of one checkpoint; q, k and v have biases."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("qwen2")).eval().requires_grad_(False)
    plan = mixed_plan(model)
    small = rankwise.compress(model, plan)
    folder = save(small, tokenizer, plan, tmp_path_factory.mktemp("made") / "small")
    return folder, plan, small


@pytest.fixture
def folder(made: Any, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


@pytest.fixture
def resaved(made: Any, tmp_path: Path) -> Path:
    """The checkpoint as transformers writes it back, in several shards."""
    model = AutoModelForCausalLM.from_pretrained(made[0])
    model.save_pretrained(tmp_path / "resaved", max_shard_size="40KB")
    return tmp_path / "resaved"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


class Breaking:
    """A tokenizer that fails when it is saved, after having written something."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")
        raise self.error


@pytest.mark.parametrize("where", ["model", "tokenizer", "plan", "checksums", "rename"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_save_that_fails_leaves_nothing(
    where: str,
    error: type[BaseException],
    made: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, plan, small = made

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("in the middle")

    def half_a_model(path: Path, **kwargs: Any) -> None:
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise error("in the middle")

    if where == "model":
        monkeypatch.setattr(small, "save_pretrained", half_a_model)
    elif where == "tokenizer":
        tokenizer = Breaking(error("in the middle"))
    elif where == "plan":
        monkeypatch.setattr(RankPlan, "save", fail)
    elif where == "checksums":
        monkeypatch.setattr(checkpoint, "write_checksums", fail)
    else:
        monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(error, match="in the middle"):
        save(small, tokenizer, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_named(made: Any, tmp_path: Path) -> None:
    _, plan, small = made
    with pytest.raises(RankwiseError, match="no space left on the disk; free some room") as raised:
        save(small, Breaking(OSError(errno.ENOSPC, "No space left on device")), plan, tmp_path / "out")
    assert raised.value.field == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_trouble_with_the_disk_is_not_called_full(made: Any, tmp_path: Path) -> None:
    _, plan, small = made
    with pytest.raises(PermissionError):
        save(small, Breaking(PermissionError(errno.EACCES, "Permission denied")), plan, tmp_path / "out")


@pytest.mark.parametrize("what", ["folder", "file"])
def test_save_never_writes_over_anything(what: str, made: Any, tmp_path: Path) -> None:
    _, plan, small = made
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
    else:
        out.write_text("precious")
    with pytest.raises(RankwiseError, match="allowed: a folder that does not exist yet"):
        save(small, None, plan, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert out.is_dir() or out.read_text() == "precious"


def test_a_stale_staging_folder_is_thrown_away(made: Any, tmp_path: Path) -> None:
    original, plan, small = made
    staging = tmp_path / ".out.staging"
    staging.mkdir()
    (staging / "stale.safetensors").write_text("of a run that was killed")
    save(small, None, plan, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    assert same(tensors(tmp_path / "out"), tensors(original))


def test_generation_settings_are_saved_as_they_are(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`top_k` without sampling: transformers refuses to write it, or does so once it was changed in memory."""
    _, plan, small = made
    settings = copy.deepcopy(small.generation_config)
    settings.top_k, settings.repetition_penalty = 7, 1.5
    monkeypatch.setattr(small, "generation_config", settings)
    with pytest.raises(ValueError, match="top_k"):
        settings.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(save(small, None, plan, tmp_path / "out")).generation_config
    assert (again.top_k, again.repetition_penalty, again.eos_token_id) == (7, 1.5, settings.eos_token_id)
    assert small.generation_config is settings


def test_save_without_tokenizer_and_in_a_new_place(made: Any, tmp_path: Path) -> None:
    _, plan, small = made
    out = save(small, None, plan, tmp_path / "new" / "place")
    assert out == tmp_path / "new" / "place"
    assert not (out / "tokenizer.json").exists()
    assert verify(out) == len(list(out.iterdir())) - 1


def test_sha256sum_agrees(folder: Path) -> None:
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    files = {p.name for p in folder.iterdir()} - {"SHA256SUMS"}
    assert {line.split(": ")[0] for line in checked.stdout.splitlines()} == files
    assert {"config.json", "model.safetensors", "plan.json", "tokenizer.json", "README.md"} <= files
    assert verify(folder) == len(files)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "plan.json", "tokenizer.json", "README.md"])
def test_one_flipped_bit_is_found(name: str, folder: Path) -> None:
    path = folder / name
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RankwiseError, match="its SHA-256 differs") as raised:
        verify(folder)
    assert raised.value.field == str(path)
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 1
    assert f"{name}: FAILED" in checked.stdout


def test_a_removed_file_is_missed(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RankwiseError, match=r"tokenizer.json: missing; SHA256SUMS lists it"):
        verify(folder)


@pytest.mark.parametrize("content", ["", "weights-left-out"], ids=["empty", "weights-left-out"])
def test_a_list_of_hashes_that_skips_files_does_not_verify(content: str, folder: Path) -> None:
    sums = folder / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True) if content else []
    sums.write_text("".join(line for line in lines if "safetensors" not in line))
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(RankwiseError, match=r"SHA256SUMS|model.safetensors"):
        verify(folder)


def test_hashes_of_a_folder_that_others_wrote(resaved: Path) -> None:
    with pytest.raises(RankwiseError, match="SHA256SUMS: no such file; only checkpoints written by `rankwise`"):
        verify(resaved)


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("strict_umask")
def test_files_can_be_read_by_others(made: Any, tokenizer: Any, tmp_path: Path) -> None:
    _, plan, small = made
    out = save(small, tokenizer, plan, tmp_path / "out")
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in out.iterdir() if p.name != "SHA256SUMS"}
    assert set(modes.values()) == {0o644}, modes


def test_subfolders_stay_open(made: Any, tmp_path: Path) -> None:
    """A tokenizer with several chat templates writes a folder."""
    original, plan, small = made
    tokenizer: Any = AutoTokenizer.from_pretrained(original)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    out = save(small, tokenizer, plan, tmp_path / "out")
    folders = [p for p in out.iterdir() if p.is_dir()]
    assert folders  # else this test says nothing
    assert all(p.stat().st_mode & stat.S_IXUSR for p in folders)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_what_the_folder_says_of_itself(made: Any) -> None:
    folder, plan, small = made
    assert RankPlan.load(folder / "plan.json") == plan
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "rankwise"
    assert config["format"] == 1
    assert config["layers"] == {name: config_entry(spec) for name, spec in plan.compressed.items()}
    assert specs_from_config(config, "config.json").keys() == plan.compressed.keys()
    card = (folder / "README.md").read_text()
    assert "somebody/qwen" in card
    assert f"{plan.ratio:.1%}" in card
    assert AutoTokenizer.from_pretrained(folder)("value of")["input_ids"]
    assert same(tensors(folder), {k: v for k, v in small.state_dict().items() if k in tensors(folder)})


def test_headers_are_read_without_the_tensors(made: Any) -> None:
    folder, plan, _ = made
    shapes = shapes_on_disk([folder / "model.safetensors"])
    assert shapes == {name: tuple(t.shape) for name, t in tensors(folder).items()}
    assert check_headers(shard_files(folder), plan.layers) == shapes


def test_open_checkpoint_gives_back_the_plan(made: Any) -> None:
    folder, plan, _ = made
    found, shards = open_checkpoint(folder)
    assert found == plan
    assert shards == [folder / "model.safetensors"]
    assert folder_bytes(folder) == (folder / "model.safetensors").stat().st_size


def test_resaved_by_transformers(made: Any, resaved: Path) -> None:
    folder, plan, small = made
    assert not (resaved / "plan.json").exists()
    found, shards = open_checkpoint(resaved)
    assert {n: config_entry(s) for n, s in found} == {n: config_entry(s) for n, s in plan.compressed.items()}
    assert len(shards) > 2
    assert folder_bytes(resaved) == sum(p.stat().st_size for p in resaved.glob("*.safetensors"))
    assert same(tensors(resaved), tensors(folder))
    again = AutoModelForCausalLM.from_pretrained(resaved)
    assert torch.equal(again(WINDOWS).logits, small(WINDOWS).logits)


def test_inspect_lists_a_resaved_folder(made: Any, resaved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, plan, _ = made
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(resaved), "--json"])
    assert ended.value.code == 0
    facts = json.loads(capfd.readouterr().out)
    assert sorted(row["name"] for row in facts["layers"]) == sorted(plan.compressed)
    assert facts["bytes"] == folder_bytes(resaved)


def test_inspect_lists_a_resaved_folder_where_all_stayed_dense(
    tiny: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    plan = rankwise.allocate(model, WINDOWS, rankwise.Global(ratio=1.0))
    assert not plan.compressed
    save(rankwise.compress(model, plan), None, plan, tmp_path / "full")
    assert open_checkpoint(tmp_path / "full")[0] == plan
    AutoModelForCausalLM.from_pretrained(tmp_path / "full").save_pretrained(tmp_path / "again")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path / "again"), "--json"])
    assert ended.value.code == 0
    assert json.loads(capfd.readouterr().out)["layers"] == []


def test_shard_that_the_index_names_is_missing(resaved: Path) -> None:
    shard = sorted(resaved.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(RankwiseError, match="no such file; the folder is incomplete") as raised:
        open_checkpoint(resaved)
    assert raised.value.field == str(shard)
    with pytest.raises((RankwiseError, OSError), match=shard.name):
        AutoModelForCausalLM.from_pretrained(resaved)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', "not json"])
def test_damaged_index_is_named(index: str, resaved: Path) -> None:
    (resaved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(RankwiseError, match=r"model.safetensors.index.json"):
        open_checkpoint(resaved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtype_keeps_the_index_whole(dtype: torch.dtype, made: Any) -> None:
    folder, _, small = made
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    state, stored = model.state_dict(), tensors(folder)
    indices = [name for name in stored if name.endswith("pivot_index")]
    assert indices
    assert all(state[name].dtype == torch.int32 and torch.equal(state[name], stored[name]) for name in indices)
    factors = [name for name in stored if "pivot_basis" in name or "lowrank_u" in name]
    assert all(torch.equal(state[name], stored[name].to(dtype)) for name in factors)
    expected, found = small(WINDOWS).logits, model(WINDOWS).logits.float().detach()
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05


def test_auto_model_without_head(made: Any) -> None:
    folder, _, small = made
    body, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(body(WINDOWS).last_hidden_state, small.model(WINDOWS).last_hidden_state)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, False),
        ("", False),
        ("[]", False),
        ('"text"', False),
        ("{}", False),
        ('{"quantization_config": null}', False),
        ('{"quantization_config": "rankwise"}', False),
        ('{"quantization_config": {"quant_method": "gptq"}}', False),
        ('{"quantization_config": {"quant_method": "rankwise"}}', True),
    ],
    ids=["none", "empty", "list", "text", "object", "null", "no-object", "gptq", "rankwise"],
)
def test_is_rankwise(content: str | None, expected: bool, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert is_rankwise(tmp_path) is expected


def test_plan_and_config_must_agree(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    first = next(iter(config["quantization_config"]["layers"]))
    del config["quantization_config"]["layers"][first]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RankwiseError, match=r"plan.json: contradicts config.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("which", ["lowrank_u", "pivot_index", "pivot_coeff", "weight"])
@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_headers_must_agree_with_the_plan(which: str, damage: str, folder: Path, made: Any) -> None:
    stored = tensors(folder)
    name = next(name for name in stored if name.endswith(f"_proj.{which}"))
    shape = list(stored[name].shape)
    if damage == "missing":
        del stored[name]
    else:
        stored[name] = torch.cat([stored[name], stored[name][:1]])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    found = "missing" if damage == "missing" else f"shape [{shape[0] + 1}"
    with pytest.raises(RankwiseError) as raised:
        open_checkpoint(folder)
    assert raised.value.field == name
    assert str(raised.value.value).startswith(found)
    assert str(shape) in raised.value.allowed


def test_dense_weights_may_lie_transposed_as_gpt2_stores_them(tmp_path: Path) -> None:
    specs = {"a": LayerSpec("dense", 6, 4, 4, "fp32")}
    for shape in ((6, 4), (4, 6)):
        save_file({"a.weight": torch.zeros(shape)}, tmp_path / "model.safetensors")
        assert check_headers([tmp_path / "model.safetensors"], specs) == {"a.weight": shape}
    save_file({"a.weight": torch.zeros(6, 6)}, tmp_path / "model.safetensors")
    with pytest.raises(RankwiseError, match=r"a.weight: shape \[6, 6\]; the plan says shape \[6, 4\]"):
        check_headers([tmp_path / "model.safetensors"], specs)
