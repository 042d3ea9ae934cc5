"""What can be found wrong with a checkpoint before vLLM starts its processes."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rankwise.engine.checkpoint import check_headers, shard_files
from rankwise.engine.doors.hf import replace_layers, require_all
from rankwise.errors import RankwiseError
from rankwise.layerspec import LayerSpec


def check_folder(model: str, config: Any, specs: dict[str, LayerSpec]) -> None:
    """Compare a folder's tensors with what config.json promises; vLLM leaves what is missing as it happens to be.

    What transformers cannot build is compared in its compressed layers alone; a name on the hub, whose files are not
    there yet, is left to the layers themselves.

    Args:
        model: as it was given to vLLM.
        config: transformers' configuration of it.
        specs: the compressed layers.

    Raises:
        RankwiseError: a tensor is missing, or contradicts config.json; or a bias that is narrower than vLLM has it.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    shapes = check_headers(shard_files(folder), specs)
    for name, spec in specs.items():
        if spec.out_features < spec.original_shape[0] and f"{name}.bias" in shapes:
            allowed = "vLLM's own biases have the dense width: serve it with rankwise's engine or transformers"
            raise RankwiseError(f"{name}.bias", f"of a layer with {spec.out_features} outputs left", allowed)
    if config is None or type(config) not in AutoModelForCausalLM._model_mapping:
        return
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    replace_layers(whole, specs)
    require_all(whole, shapes)
