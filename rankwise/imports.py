"""From a folder that transformers saved with bitsandbytes' nf4 to a checkpoint of ours: the same bytes, other names.

Neither bitsandbytes nor a model in memory is needed: tensors pass through shard by shard.
"""

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM

from rankwise.anatomy import linear_shapes
from rankwise.bnb import METHOD, check_quantization, companions, quantised_names, read_nf4
from rankwise.config import check
from rankwise.engine.card import write_card
from rankwise.engine.checkpoint import CONFIG, PLAN, config_entry, headers, open_checkpoint, shard_files
from rankwise.engine.doors.hf import replace_layers, require_all
from rankwise.errors import RankwiseError
from rankwise.files import (
    disk_guard,
    open_tensors,
    publish,
    read_json,
    require_room,
    sha256,
    write_checksums,
    write_json,
    write_tensors,
)
from rankwise.jobs import Job, is_free, is_unfinished, work_folder
from rankwise.plan import FORMAT, LayerSpec, RankPlan
from rankwise.progress import Track, silent
from rankwise.provenance import versions
from rankwise.zoo import require_folder

FLOATS = {"BF16": ("bf16", torch.bfloat16), "F16": ("fp16", torch.float16), "F32": ("fp32", torch.float32)}
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")  # tokenizer and generation settings; no pickle, no code
INDEX = "model.safetensors.index.json"
NOT_BESIDE = (CONFIG, PLAN)


@dataclass(frozen=True)
class Source:
    """A folder of bitsandbytes.

    Args:
        folder: holds config.json and safetensors.
        config: that file.
        shards: the safetensors files.
        tensors: name to shape, dtype (safetensors' name for it) and the file that holds it.
        matrices: names of the tensors whose numbers are in nf4.
    """

    folder: Path
    config: dict[str, Any]
    shards: list[Path]
    tensors: dict[str, tuple[tuple[int, ...], str, Path]]
    matrices: set[str]

    def fetch(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        if name not in self.tensors:
            raise RankwiseError(name, "missing", "the folder is incomplete; save it again")
        with open_tensors(self.tensors[name][2]) as file:
            found: torch.Tensor = file.get_tensor(name)
        return found


def import_folder(source: str, out: Path, *, restart: bool = False, track: Track = silent) -> RankPlan:
    """Write a checkpoint with the codes of a folder saved with bitsandbytes. Killed anywhere, the same call continues.

    Args:
        source: the folder, or a hub id.
        out: the checkpoint; must not exist.
        restart: throw away unfinished work of an earlier call instead of continuing it.
        track: progress.

    Returns:
        The plan, as written into the checkpoint: layers that bitsandbytes skipped stay dense, in their dtype.

    Raises:
        RankwiseError: anything but nf4 in blocks of 64 in the linear layers of decoder blocks; a damaged folder; a
            full disk. Nothing is left under `out`.
    """
    begun = is_unfinished(out)
    check("out", str(out), is_free(out, restart), "a folder that does not exist yet")
    found = open_source(source)
    plan = plan_of(found, source, track)
    shards = {path.name: path.stat().st_size for path in found.shards}
    identity: dict[str, Any] = {"import": source, CONFIG: sha256(found.folder / CONFIG), "shards": shards}
    there = sum(path.stat().st_size for path in work_folder(out).rglob("*") if path.is_file())
    require_room(out.absolute().parent, max(0, sum(shards.values()) + plan.bytes // 8 - there))
    with Job.open(out, identity, restart=restart) as job, disk_guard(out):
        check("out", str(out), begun or not out.exists(), "a folder that does not exist yet")  # nobody was quicker
        if not out.exists():  # else the last run was killed between the rename and the cleaning up
            _write(found, plan, job.folder / "checkpoint", out, track)
        job.finish()
    return RankPlan.load(out / PLAN)


def open_source(source: str) -> Source:
    """A folder or a hub id as a checked `Source`."""
    require_folder(source)
    try:
        folder = Path(source) if Path(source).is_dir() else _downloaded(source)
    except (OSError, ValueError) as error:
        raise RankwiseError("model", f"{source} ({type(error).__name__})", "allowed: a hub id or a folder") from error
    config = read_json(folder / CONFIG)
    check_quantization(config, source)
    shards = shard_files(folder)
    tensors = {name: (*header, path) for path in shards for name, header in headers([path]).items()}
    matrices = quantised_names(set(tensors))
    if not matrices:
        raise RankwiseError("model", f"{source} (no tensors in 4 bits)", f"a folder saved with {METHOD}'s nf4")
    return Source(folder, config, shards, tensors, matrices)


def _downloaded(source: str) -> Path:
    return Path(snapshot_download(source, allow_patterns=["*.safetensors", *BESIDE]))


def plan_of(source: Source, name: str, track: Track = silent) -> RankPlan:
    """What each linear layer of the decoder blocks is in the source; every matrix in nf4 is read, to find damage.

    Raises:
        RankwiseError: other layers are in 4 bits too, a tensor is missing or damaged, or does not fit the model.
    """
    model = _skeleton(source, name)
    linears = linear_shapes(model)
    for matrix in sorted(source.matrices):
        if matrix.removesuffix(".weight") not in linears:
            allowed = "allowed in 4 bits: linear layers of decoder blocks; save it with llm_int8_skip_modules"
            raise RankwiseError(matrix, "nf4", allowed)
    layers = {}
    with track("layers", len(linears)) as advance:
        for layer, shape in linears.items():
            layers[layer] = _spec(source, layer, shape)
            advance()
    facts = {"model": name, "quant_method": METHOD, "double_quantised": _doubled(source)}
    plan = RankPlan(layers, provenance={"imported": facts, "versions": versions()})
    replace_layers(model, plan.compressed)
    made = {matrix + part for matrix in source.matrices for part in ("_nf4", "_absmax")}
    known = {found: None if found in source.matrices else shape for found, (shape, *_) in source.tensors.items()}
    require_all(model, known | dict.fromkeys(made))
    return plan


def _skeleton(source: Source, name: str) -> Any:
    """The model without numbers."""
    try:
        config = AutoConfig.from_pretrained(source.folder)
        del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, AttributeError, OSError) as error:
        reason = f"{name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise RankwiseError("model", reason, "a causal language model that transformers knows is needed") from error


def _spec(source: Source, layer: str, shape: tuple[int, int]) -> LayerSpec:
    name = f"{layer}.weight"
    if name in source.matrices:
        rows, half = read_nf4(name, source.fetch).codes.shape
        if (rows, 2 * half) != shape:
            raise RankwiseError(f"{name}: shape", [rows, 2 * half], f"the model has {list(shape)}")
        return LayerSpec("dense", *shape, min(shape), "nf4")
    if name not in source.tensors:
        raise RankwiseError(name, "missing", "the folder is incomplete; save it again")
    _, dtype, _ = source.tensors[name]
    if dtype not in FLOATS:
        raise RankwiseError(name, f"{dtype} without quant_state", f"allowed: nf4, {', '.join(FLOATS)}")
    return LayerSpec("dense", *shape, min(shape), FLOATS[dtype][0])


def _doubled(source: Source) -> int:
    """Matrices whose absmax is in 8 bits."""
    there = [source.tensors.get(f"{name}.absmax") for name in source.matrices]
    return sum(entry is not None and entry[1] == "U8" for entry in there)


def _write(source: Source, plan: RankPlan, staged: Path, out: Path, track: Track) -> None:
    """Put the checkpoint together in `staged`, check it and rename it; shards that are there already stay."""
    parts = {name for matrix in source.matrices for name in companions(matrix)}
    with track("shards", len(source.shards)) as advance:
        for path in source.shards:
            if not (staged / path.name).exists():
                write_tensors(staged / path.name, _shard(source, path, parts), {"format": "pt"})
            advance()
    _describe(source, plan, staged)
    open_checkpoint(staged)
    publish(staged, out)


def _describe(source: Source, plan: RankPlan, staged: Path) -> None:
    """All that goes with the shards in `staged`: config, index, tokenizer, plan, card, hashes."""
    shards = [staged / path.name for path in source.shards]
    total = sum(_tensor_bytes(path) for path in shards)
    if (source.folder / INDEX).is_file():
        names = {name: path.name for path in shards for name in headers([path])}
        write_json(staged / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})
    entries = {name: config_entry(spec) for name, spec in plan.compressed.items()}
    stored = {"quant_method": "rankwise", "format": FORMAT, "layers": entries}
    write_json(staged / CONFIG, source.config | {"quantization_config": stored})
    for path in sorted({path for pattern in BESIDE for path in source.folder.glob(pattern)}):
        if path.name not in NOT_BESIDE and not path.name.endswith(".index.json"):
            shutil.copyfile(path, staged / path.name)
    plan.other_bytes = total - plan.bytes
    plan.save(staged / PLAN)
    write_card(staged, plan)
    for path in staged.iterdir():
        path.chmod(0o644)  # safetensors leaves its files readable by the owner alone
    write_checksums(staged)


def _shard(source: Source, path: Path, parts: set[str]) -> dict[str, torch.Tensor]:
    """The tensors that take the place of a shard's."""
    made: dict[str, torch.Tensor] = {}
    for name, (_, _, place) in source.tensors.items():
        if place != path or name in parts:
            continue
        if name in source.matrices:
            codes, absmax = read_nf4(name, source.fetch)
            made |= {f"{name}_nf4": codes, f"{name}_absmax": absmax, name: torch.zeros(1, dtype=_dtype(source))}
        else:
            made[name] = source.fetch(name)
    return made


def _dtype(source: Source) -> torch.dtype:
    """Of the guards: that of the largest tensor that is not in 4 bits, which is the embedding."""
    others = [entry for name, entry in source.tensors.items() if name not in source.matrices]
    found = [(prod(shape), dtype) for shape, dtype, _ in others if dtype in FLOATS]
    return FLOATS[max(found)[1]][1]


def _tensor_bytes(path: Path) -> int:
    """Bytes of a safetensors file's tensors: all behind its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
