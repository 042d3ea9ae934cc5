"""rankwise: SVD compression of language models, with ranks chosen under an exact budget.

The names below load on first use, so ``import rankwise`` costs almost nothing. Importing the package also
teaches transformers to open rankwise checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rankwise.engine.doors.lazy import register_with_transformers

__version__ = "0.1.0"

_HOME = {
    "CompressConfig": "rankwise.config",
    "TextConfig": "rankwise.config",
    "RankwiseError": "rankwise.errors",
    "LayerSpec": "rankwise.plan",
    "RankPlan": "rankwise.plan",
    "Precision": "rankwise.storage",
    "LLM": "rankwise.engine.runtime.llm",
    "SamplingParams": "rankwise.engine.runtime.params",
    "Completion": "rankwise.engine.runtime.params",
    "Ara": "rankwise.alloc.methods.ara",
    "Ars": "rankwise.alloc.methods.ars",
    "Asvd": "rankwise.alloc.methods.asvd",
    "DRank": "rankwise.alloc.methods.drank",
    "Dobi": "rankwise.alloc.methods.dobi",
    "Llrc": "rankwise.alloc.methods.llrc",
    "Rankwise": "rankwise.alloc.methods.rankwise",
    "Strs": "rankwise.alloc.methods.strs",
    "SvdLlm": "rankwise.alloc.methods.svdllm",
    "SvdLlmV2": "rankwise.alloc.methods.svdllm",
    "Uniform": "rankwise.alloc.methods.uniform",
    "Global": "rankwise.alloc.methods.lagrange",
    "allocate": "rankwise.pipeline",
    "compress": "rankwise.pipeline",
    "load_model": "rankwise.zoo",
    "perplexity": "rankwise.evaluate",
    "save": "rankwise.engine.checkpoint",
}
__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from rankwise.alloc.methods.ara import Ara as Ara
    from rankwise.alloc.methods.ars import Ars as Ars
    from rankwise.alloc.methods.asvd import Asvd as Asvd
    from rankwise.alloc.methods.dobi import Dobi as Dobi
    from rankwise.alloc.methods.drank import DRank as DRank
    from rankwise.alloc.methods.lagrange import Global as Global
    from rankwise.alloc.methods.llrc import Llrc as Llrc
    from rankwise.alloc.methods.rankwise import Rankwise as Rankwise
    from rankwise.alloc.methods.strs import Strs as Strs
    from rankwise.alloc.methods.svdllm import SvdLlm as SvdLlm
    from rankwise.alloc.methods.svdllm import SvdLlmV2 as SvdLlmV2
    from rankwise.alloc.methods.uniform import Uniform as Uniform
    from rankwise.config import CompressConfig as CompressConfig
    from rankwise.config import TextConfig as TextConfig
    from rankwise.engine.checkpoint import save as save
    from rankwise.engine.runtime.llm import LLM as LLM
    from rankwise.engine.runtime.params import Completion as Completion
    from rankwise.engine.runtime.params import SamplingParams as SamplingParams
    from rankwise.errors import RankwiseError as RankwiseError
    from rankwise.evaluate import perplexity as perplexity
    from rankwise.pipeline import allocate as allocate
    from rankwise.pipeline import compress as compress
    from rankwise.plan import LayerSpec as LayerSpec
    from rankwise.plan import RankPlan as RankPlan
    from rankwise.storage import Precision as Precision
    from rankwise.zoo import load_model as load_model


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__


register_with_transformers()
