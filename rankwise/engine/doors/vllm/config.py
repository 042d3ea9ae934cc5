"""What a checkpoint of ours says to vLLM: which of its linear layers are compressed, and how."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from rankwise.engine.checkpoint import specs_from_config
from rankwise.engine.doors.vllm.folder import check_folder
from rankwise.engine.doors.vllm.method import RankwiseLinearMethod
from rankwise.engine.doors.vllm.versions import Named
from rankwise.errors import RankwiseError
from rankwise.layerspec import LayerSpec


class RankwiseConfig(Named):
    """The layers that config.json lists, by their names in vLLM's model. It is sent to vLLM's other processes.

    Args:
        specs: of the compressed layers.
    """

    def __init__(self, specs: dict[str, LayerSpec]) -> None:
        super().__init__()
        self.specs, self.unclaimed = specs, set(specs)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RankwiseConfig":
        """From `quantization_config` of config.json.

        Raises:
            RankwiseError: another format, layers that cannot be, or embeddings in 8 bits.
        """
        if config.get("embeddings"):
            allowed = (
                "vLLM's own tables hold 16 or 32 bits: compress without --embeddings, or serve with rankwise's own"
            )
            raise RankwiseError("embeddings", ", ".join(config["embeddings"].values()), allowed)
        return cls(specs_from_config(config, "config.json"))

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those that the kernels know."""
        return [torch.bfloat16, torch.float16, torch.float32]

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM asks once, before anything starts: the time to find out what is wrong with a folder."""
        check_folder(model_name, hf_config, self.specs)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names of modules as vLLM's model has them; fused ones keep the names of their parts."""
        names = hf_to_vllm_mapper.get_rename_mapper()
        self.specs, self.unclaimed = names.apply_dict(self.specs), set(names.apply_list(sorted(self.unclaimed)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What a layer of vLLM's model becomes; None leaves it as it is.

        Raises:
            RankwiseError: it is compressed, and no linear layer.
        """
        path, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{path}.{part}" if path else part for part in parts]
        specs = [self.specs.get(name) for name in names]
        if not isinstance(layer, LinearBase):
            if any(specs):
                raise RankwiseError(prefix, type(layer).__name__, "the plan may name linear layers only")
            return None
        self.unclaimed -= set(names)
        return RankwiseLinearMethod(names, specs) if any(specs) else UnquantizedLinearMethod()

    def get_checkpoint_weight_mapper(self) -> Any:
        """vLLM asks when its model is built and before it reads any tensor.

        Raises:
            RankwiseError: the model has no linear layer by the name of a compressed one.
        """
        self.require_claimed()
        return super().get_checkpoint_weight_mapper()

    def require_claimed(self) -> None:
        """Raise a RankwiseError if a compressed layer is no layer of vLLM's model; some may be on other stages."""
        from vllm.distributed import get_pp_group

        if self.unclaimed and get_pp_group().world_size == 1:
            allowed = (
                "vLLM builds this architecture from other layers: serve it with rankwise's or transformers' engine"
            )
            raise RankwiseError(min(self.unclaimed), "no linear layer of vLLM's model", allowed)
