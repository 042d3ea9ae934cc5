"""Who takes part: engines by name, and the reasons why one cannot."""

from collections.abc import Sequence
from importlib.util import find_spec

from rankwise.bench.config import Contestant
from rankwise.engine.checkpoint import is_rankwise
from rankwise.errors import RankwiseError
from rankwise.zoo import local_folder, resolve_device

ENGINES = ("rankwise", "transformers", "bitsandbytes", "vllm")
SEPARATE = ("bitsandbytes", "vllm")  # packages that rankwise does without
DENSE_ONLY = ("bitsandbytes",)  # it cannot open a rankwise checkpoint


def line_up(models: Sequence[str], engines: Sequence[str], device: str = "auto") -> list[Contestant]:
    """Every engine on every model that it can open; models in the order given, engines within each.

    Args:
        models: names or folders; the first one is what others are compared with.
        engines: names; those of `DENSE_ONLY` are left out for compressed models.
        device: as in `resolve_device`.

    Raises:
        RankwiseError: an unknown engine, one that is not installed or does not suit the device, or one that can open
            none of the models.
    """
    for engine in engines:
        _require(engine, device)
    found = [
        Contestant(engine, model)
        for model in dict.fromkeys(models)
        for engine in dict.fromkeys(engines)
        if engine not in DENSE_ONLY or not is_compressed(model)
    ]
    for engine in engines:
        if not any(contestant.engine == engine for contestant in found):
            raise RankwiseError("engine", f"{engine} (it opens dense models only)", "give one with --against")
    return found


def is_compressed(model: str) -> bool:
    """Whether a model is a folder that rankwise wrote."""
    folder = None if model.startswith("embedded:") or model.endswith(".gguf") else local_folder(model)
    return folder is not None and is_rankwise(folder)


def _require(engine: str, device: str) -> None:
    if engine not in ENGINES:
        raise RankwiseError("engine", engine, f"allowed: {', '.join(ENGINES)}")
    if engine in SEPARATE and find_spec(engine) is None:
        raise RankwiseError("engine", f"{engine} (not installed)", f"pip install {engine}, or leave it out")
    if engine == "vllm":
        _require_vllm(resolve_device(device).type)


def _require_vllm(device: str) -> None:
    try:
        from vllm.platforms import current_platform
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise RankwiseError("engine", f"vllm (its import fails: {text})", "repair it, or leave it out") from error
    if current_platform.device_type != device:
        raise RankwiseError("engine", f"vllm (built for {current_platform.device_type})", f"this run is on {device}")
