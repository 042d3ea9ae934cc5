"""What cannot be served is refused with one line that says what to do."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from rankwise.engine.doors.vllm import versions
from rankwise.engine.doors.vllm.config import RankwiseConfig
from rankwise.errors import RankwiseError
from tests_vllm.conftest import opened

SCRIPT = Path(sys.executable).with_name("rankwise")


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint("llama", "mixed"), tmp_path / "copy"))


def without(folder: Path, ending: str) -> str:
    """Take the first tensor whose name ends so out of the file."""
    stored = load_file(folder / "model.safetensors")
    name = min(name for name in stored if name.endswith(ending))
    del stored[name]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("ending", ["lowrank_u", "_nf4", "input_layernorm.weight", "embed_tokens.weight"])
def test_a_missing_tensor(ending: str, folder: Path) -> None:
    """vLLM alone would take what happens to be in memory."""
    name = without(folder, ending)
    with (
        pytest.raises(ValueError, match=f"{name.removeprefix('model.')}: (missing|not in the checkpoint)"),
        opened(folder),
    ):
        pass


def test_a_layer_that_vllm_has_not(folder: Path) -> None:
    """With names of another architecture nothing is loaded."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    layers = config["quantization_config"]["layers"]
    entry = next(iter(layers.values()))
    layers["model.layers.7.self_attn.q_proj"] = entry
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model.layers.7.self_attn.q_proj"), opened(folder):
        pass


def test_claims(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers does not know is left to vLLM's model: there every compressed layer must find its place."""
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: SimpleNamespace(world_size=1))
    config = RankwiseConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.unclaimed = {"model.layers.0.mixer.in_proj"}
    with pytest.raises(RankwiseError, match=r"mixer.in_proj: no linear layer of vLLM's model; .* transformers' engine"):
        config.get_checkpoint_weight_mapper()
    config.unclaimed = set()
    config.get_checkpoint_weight_mapper()


def refused(*arguments: str) -> str:
    """The one line that the command says."""
    done = subprocess.run([str(SCRIPT), "serve", *arguments], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_groups_that_ranks_would_cut(checkpoint: Callable[..., Path]) -> None:
    line = refused(str(checkpoint("llama", "nf4")), "--engine", "vllm", "--", "--tensor-parallel-size", "8")
    assert "tensor_parallel_size: 8" in line
    assert line.endswith("allowed: 1, 2, 4")


def test_a_worker_says_why_in_the_last_line(folder: Path) -> None:
    """What only vLLM's inner processes find out is the last that the command says."""
    stored = load_file(folder / "model.safetensors")
    name = min(name for name in stored if name.endswith("pivot_index"))
    stored[name][1] = stored[name][0]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [str(SCRIPT), "serve", str(folder), "--engine", "vllm", "--port", "0"]
    more = ["--", "--enforce-eager", "--skip-tokenizer-init"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {name}: no permutation; ")


def test_another_version(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    monkeypatch.setattr(versions.logger, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(versions.vllm, "__version__", "0.99.1")
    versions.register_tested()
    assert said == ["rankwise is tested with vLLM 0.32; this is 0.99.1 and may not work"]
    said.clear()
    monkeypatch.setattr(versions.vllm, "__version__", "0.32.4+cpu")
    versions.register_tested()
    assert not said
