"""How a compressed model lies on disk: writing, checking, listing.

A checkpoint is an ordinary Hugging Face folder plus `plan.json` (the plan with its provenance) and `SHA256SUMS`.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankwise.engine.card import write_card
from rankwise.engine.layers import tensor_shapes
from rankwise.errors import RankwiseError
from rankwise.files import (
    check_checksums,
    disk_guard,
    open_tensors,
    publish,
    read_json,
    write_checksums,
)
from rankwise.plan import FORMAT, LayerSpec, RankPlan, check_embeddings, check_format

GENERATION = "generation_config.json"
PLAN = "plan.json"
CONFIG = "config.json"
DTYPES = {"uint8": "U8", "int8": "I8", "bfloat16": "BF16", "float32": "F32", "int32": "I32"}  # safetensors' names


def config_entry(spec: LayerSpec) -> dict[str, Any]:
    """A compressed layer's entry in config.json; optional fields only where they are set."""
    shape = list(spec.dense_shape) if spec.dense_shape else None
    optional = {"group": spec.group, "asymmetric": spec.asymmetric, "dense_shape": shape}
    return {
        "kind": spec.kind,
        "rank": spec.rank,
        "out_features": spec.out_features,
        "in_features": spec.in_features,
        "weights": spec.weights,
        **{key: value for key, value in optional.items() if value},
    }


def specs_from_config(config: Mapping[str, Any], source: str) -> dict[str, LayerSpec]:
    """The compressed layers that a `quantization_config` lists."""
    check_format(config.get("format"), source)
    if config.get("layers") == {}:
        return {}
    layers = RankPlan.from_dict({"format": FORMAT, "layers": config.get("layers")}, source).layers
    return dict(sorted(layers.items(), key=lambda item: _natural(item[0])))  # transformers sorts 10 before 2


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def save(model: Any, tokenizer: Any, plan: RankPlan, out: str | Path, staging: Path | None = None) -> Path:
    """Write a compressed model as a checkpoint folder: complete, or not at all.

    Args:
        model: made by `rankwise.compress`.
        tokenizer: saved beside it; None leaves it out.
        plan: the plan that the model was made from.
        out: the folder; must not exist.
        staging: where the folder is put together before the rename; same disk as `out`.

    Returns:
        `out` as a path.

    Raises:
        RankwiseError: `out` exists, or the disk is full.
    """
    out = Path(out)
    if out.exists():
        raise RankwiseError("out", str(out), "allowed: a folder that does not exist yet")
    staging = staging or out.parent / f".{out.name}.staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with disk_guard(out):
            _write_model(model, staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            plan.save(staging / PLAN)
            write_card(staging, plan)
            for path in (entry for entry in staging.iterdir() if entry.is_file()):
                path.chmod(0o644)  # safetensors leaves its files readable by the owner alone
            write_checksums(staging)
            publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _write_model(model: Any, folder: Path) -> None:
    """`save_pretrained`, with the settings for generation that the model came with.

    Some versions of transformers refuse to write what they merely warn of when they read it: a `top_k` that no sampling
    uses, as many models have it.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        model.save_pretrained(folder)
        return
    model.generation_config = type(settings)()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = settings
    if (folder / GENERATION).exists():
        settings.to_json_file(folder / GENERATION, keys_to_pop=["compile_config"])


def headers(files: Iterable[str | Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name to shape and dtype (by safetensors' name for it), from the headers of safetensors files."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in files:
        with open_tensors(Path(path)) as file:
            for name in file.keys():  # noqa: SIM118
                header = file.get_slice(name)
                found[name] = tuple(header.get_shape()), header.get_dtype()
    return found


def shapes_on_disk(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name to shape, from the headers of safetensors files."""
    return {name: shape for name, (shape, _) in headers(files).items()}


def check_headers(files: Iterable[str | Path], specs: Mapping[str, LayerSpec]) -> dict[str, tuple[int, ...]]:
    """Compare tensors on disk with the specs; return their shapes. Of layers in 4 or 8 bits dtypes are compared too.

    Raises:
        RankwiseError: a tensor is missing or contradicts the plan. transformers alone would fill a missing one
            with random numbers and a warning.
    """
    there = headers(f for f in files if str(f).endswith(".safetensors"))
    shapes = {name: shape for name, (shape, _) in there.items()}
    for name, spec in specs.items():
        for tensor, expected in tensor_shapes(spec).items():
            found = shapes.get(f"{name}.{tensor}")
            turned = not spec.compressed and found == expected[::-1]  # GPT-2 stores [in, out]
            if found != expected and not turned:
                problem = "missing" if found is None else f"shape {list(found)}"
                raise RankwiseError(f"{name}.{tensor}", problem, f"the plan says shape {list(expected)}")
        for tensor, stored in spec.tensors.items() if spec.quantised else ():
            dtype = there[f"{name}.{tensor}"][1]
            if dtype != DTYPES[stored.dtype]:
                raise RankwiseError(f"{name}.{tensor}", dtype, f"the plan says {DTYPES[stored.dtype]}")
    return shapes


def open_checkpoint(folder: str | Path) -> tuple[RankPlan, list[Path]]:
    """The plan of a checkpoint and its shards, headers checked against the plan.

    A folder re-saved by transformers has no plan.json; then the plan holds the compressed layers alone.

    Raises:
        RankwiseError: missing, truncated, foreign or self-contradictory checkpoint.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RankwiseError(
            "checkpoint", f"{folder} (no config.json in it)", "a folder written by rankwise is expected"
        )
    whole = read_json(folder / CONFIG)
    if not isinstance(whole, dict):
        raise RankwiseError(str(folder / CONFIG), "no object", "the file is damaged; write the checkpoint again")
    config = _quantization(whole)
    if config.get("quant_method") != "rankwise":
        raise RankwiseError("checkpoint", f"{folder} (not compressed by rankwise)", "a rankwise folder is expected")
    specs = specs_from_config(config, str(folder / CONFIG))
    plan = RankPlan.load(folder / PLAN) if (folder / PLAN).is_file() else RankPlan(specs)
    planned = {name: config_entry(spec) for name, spec in plan.compressed.items()}
    coded = check_embeddings(config.get("embeddings", {}), str(folder / CONFIG))
    if not (folder / PLAN).is_file():
        plan.embeddings = coded
    if planned != {name: config_entry(spec) for name, spec in specs.items()} or plan.embeddings != coded:
        raise RankwiseError(str(folder / PLAN), "contradicts config.json", "both must list the same layers and ranks")
    shards = shard_files(folder)
    _check_tables(check_headers(shards, plan.layers if (folder / PLAN).is_file() else specs), coded)
    return plan, shards


def _check_tables(shapes: Mapping[str, tuple[int, ...]], coded: Mapping[str, str]) -> None:
    """Raise a RankwiseError unless every coded table has its codes, scales and guard."""
    for name in coded:
        rows = shapes.get(f"{name}.weight_int8", (0,))[0]
        for part, expected in {"weight_int8": rows, "weight_scale": rows, "weight": 1}.items():
            found = shapes.get(f"{name}.{part}", ())
            if not found or found[0] != expected or not rows:
                problem = f"shape {list(found)}" if found else "missing"
                raise RankwiseError(f"{name}.{part}", problem, "the folder is damaged; write the checkpoint again")


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model folder, index followed."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        data = read_json(index)
        files = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise RankwiseError(str(index), "no weight_map in it", "the index is damaged; write the checkpoint again")
        return [folder / name for name in sorted(set(files.values()))]
    return [folder / "model.safetensors"]


def verify(folder: str | Path) -> int:
    """Check hashes, then shapes and plan; return how many files were hashed.

    Raises:
        RankwiseError: for the first thing that is wrong.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RankwiseError(
            "checkpoint", f"{folder} (no config.json in it)", "a folder written by rankwise is expected"
        )
    required = [CONFIG, PLAN, *(path.name for path in shard_files(folder))]
    count = check_checksums(folder, required)
    _, shards = open_checkpoint(folder)
    _check_values(shards)
    return count


def _check_values(shards: list[Path]) -> None:
    """A pivot_index must be a permutation, else outputs would be mixed up or lost; a zero point is a code, 0..15."""
    for path in shards:
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(".pivot_index"):
                    index, problem = file.get_tensor(name), "no permutation"
                    good = index.sort().values.tolist() == list(range(len(index)))
                elif name.endswith("_zero"):
                    good, problem = bool((file.get_tensor(name) <= 15).all()), "zero points above 15"
                else:
                    continue
                if not good:
                    raise RankwiseError(name, problem, "the tensor is damaged; write the checkpoint again")


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the weight files of a model folder (safetensors)."""
    return sum(path.stat().st_size for path in shard_files(Path(folder)))


def is_rankwise(folder: str | Path) -> bool:
    """True if `folder` is a checkpoint of ours."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return _quantization(config).get("quant_method") == "rankwise"


def _quantization(config: Any) -> dict[str, Any]:
    """`quantization_config` of a config.json; empty if there is none, or none worth the name."""
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}
