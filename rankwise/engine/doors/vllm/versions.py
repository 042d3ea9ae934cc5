"""Which vLLM this is, and what is said of one that the tests do not run with."""

from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from rankwise.engine.doors.vllm import METHOD, TESTED
from rankwise.engine.doors.vllm.refusals import note_refusals
from rankwise.errors import RankwiseError

logger = init_logger("vllm.rankwise")
WANTED = ".".join(map(str, TESTED))


def release(version: str) -> tuple[int, ...]:
    """`0.32.0+cpu` as (0, 32); what is no number ends it."""
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def register_tested() -> None:
    """Register the quantization method, or one that refuses where vLLM's interfaces are not those that we know."""
    note_refusals()
    if release(vllm.__version__) != TESTED:
        logger.warning("rankwise is tested with vLLM %s; this is %s and may not work", WANTED, vllm.__version__)
    try:
        from rankwise.engine.doors.vllm.config import RankwiseConfig
    except (ImportError, AttributeError, TypeError) as error:
        Refusal.why = " ".join(str(error).split())
        register_quantization_config(METHOD)(Refusal)
    else:
        register_quantization_config(METHOD)(RankwiseConfig)


class Named(QuantizationConfig):
    """What vLLM asks of every quantization method, and ours need not think about."""

    def get_name(self) -> str:
        """As in config.json."""
        return METHOD

    @classmethod
    def get_min_capability(cls) -> int:
        """Triton's own limit is met by every GPU that vLLM runs on."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All is in config.json."""
        return []


class Refusal(Named):
    """Stands for the method where it cannot work."""

    why = ""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Never.

        Raises:
            RankwiseError: always.
        """
        allowed = f"tested with {WANTED}: pip install 'vllm=={WANTED}.*'"
        raise RankwiseError("vllm", f"{vllm.__version__} ({cls.why})", allowed)

    def get_supported_act_dtypes(self) -> list[Any]:
        """None."""
        return []

    def get_quant_method(self, layer: Any, prefix: str) -> None:
        """None."""
