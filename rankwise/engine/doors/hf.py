"""The transformers door: `AutoModelForCausalLM.from_pretrained` opens rankwise checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankwise.anatomy import features
from rankwise.engine.checkpoint import check_headers, config_entry, specs_from_config
from rankwise.engine.embeddings import place_embeddings
from rankwise.engine.layers import build_layer
from rankwise.errors import RankwiseError
from rankwise.plan import FORMAT, LayerSpec, check_embeddings

METHOD = "rankwise"


class RankwiseQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the format, one entry per compressed layer, and coded embeddings."""

    def __init__(
        self,
        layers: dict[str, Any] | None = None,
        format: int = FORMAT,
        embeddings: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format = format
        self.layers = layers or {}
        if embeddings:
            self.embeddings = embeddings


class RankwiseQuantizer(HfQuantizer):
    """Puts empty compressed layers in place before transformers loads the tensors."""

    requires_calibration = True  # `from_pretrained(dense, quantization_config=...)` makes no sense here
    quantization_config: RankwiseQuantizationConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed beyond torch."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        stored = self.quantization_config.to_dict()
        specs = specs_from_config(stored, "config.json")
        shapes = check_headers(kwargs.get("checkpoint_files") or [], specs)
        replace_layers(model, specs)
        if tables := check_embeddings(stored.get("embeddings", {}), "config.json"):
            place_embeddings(model, tables, torch.device("meta"))
        require_all(model, shapes)

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top are; the layers themselves are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` works."""
        return True


def replace_layers(model: nn.Module, specs: dict[str, LayerSpec]) -> None:
    """Swap the named linear layers of a model for empty compressed ones, in place, on the meta device.

    Raises:
        RankwiseError: a name is no linear layer of this model, or the shapes differ.
    """
    base = f"{getattr(model, 'base_model_prefix', '')}."
    for name, spec in specs.items():
        parent, leaf, old = _find(model, name, base)
        if not isinstance(old, nn.Linear | Conv1D):
            raise RankwiseError(name, type(old).__name__, "the plan may name linear layers only")
        found, expected = features(old), spec.original_shape
        if found != expected:
            raise RankwiseError(name, f"[out, in] = {list(found)} in the model", f"the plan says {list(expected)}")
        dtype, bias = old.weight.dtype, old.bias is not None
        setattr(parent, leaf, build_layer(spec, bias, dtype, torch.device("meta")))


def require_all(model: Any, stored: Mapping[str, tuple[int, ...] | None]) -> None:
    """Raise a RankwiseError for a tensor that the checkpoint lacks, or has in another shape than the model.

    transformers would make up the one, and up to its version 5.22 take the other as it is. Architectures whose tensors
    it renames or joins while loading are not looked at; its report, from 5.23 on, names such shapes itself.

    Args:
        model: with compressed layers in place.
        stored: name to shape of the tensors on disk, None for a shape that is not looked at. An empty mapping (nothing
            known of the files) passes.
    """
    if not stored or get_checkpoint_conversion_mapping(getattr(model.config, "model_type", "")) is not None:
        return
    base = f"{getattr(model, 'base_model_prefix', '')}."
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    found = {name.removeprefix(base): shape for name, shape in stored.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := {name.removeprefix(base) for name in expected.keys() - tied} - found.keys():
        raise RankwiseError(min(missing), "not in the checkpoint", "the folder is incomplete; write it again")
    for name, shape in expected.items():
        if (there := found.get(name.removeprefix(base))) is not None and there != shape:
            raise RankwiseError(name, f"shape {list(there)}", f"the model has shape {list(shape)}")


def attach(model: Any, specs: dict[str, LayerSpec], embeddings: dict[str, str] | None = None) -> None:
    """Tell a compressed model in memory what it is, so that `save_pretrained` writes a loadable checkpoint."""
    config = RankwiseQuantizationConfig(
        {name: config_entry(spec) for name, spec in specs.items()}, embeddings=embeddings
    )
    model.config.quantization_config = config
    model.hf_quantizer = RankwiseQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD


def detach(model: Any) -> None:
    """Undo `attach`: the model's own layers are back."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False


def _find(model: nn.Module, name: str, base: str) -> tuple[nn.Module, str, Any]:
    for candidate in (name, name.removeprefix(base)):  # AutoModel loads the same folder without its head
        path, _, leaf = candidate.rpartition(".")
        try:
            parent = model.get_submodule(path)
            return parent, leaf, getattr(parent, leaf)
        except AttributeError:
            continue
    raise RankwiseError(name, "no such module", f"the plan does not fit {type(model).__name__}")


def register() -> None:
    """Make transformers know `quant_method: rankwise`; harmless if called again."""
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, RankwiseQuantizer)
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, RankwiseQuantizationConfig)


register()
