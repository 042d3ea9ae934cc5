"""One allocation method a file, one protocol (`base.Method`)."""

from rankwise.alloc.methods.ara import Ara
from rankwise.alloc.methods.ars import Ars
from rankwise.alloc.methods.asvd import Asvd
from rankwise.alloc.methods.base import Method
from rankwise.alloc.methods.dobi import Dobi
from rankwise.alloc.methods.drank import DRank
from rankwise.alloc.methods.lagrange import Global
from rankwise.alloc.methods.llrc import Llrc
from rankwise.alloc.methods.rankwise import Rankwise
from rankwise.alloc.methods.strs import Strs
from rankwise.alloc.methods.svdllm import SvdLlm, SvdLlmV2
from rankwise.alloc.methods.uniform import Uniform
from rankwise.errors import RankwiseError

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Rankwise, Global, Uniform, SvdLlm, SvdLlmV2, DRank, Strs, Asvd, Ara, Llrc, Ars, Dobi)
}


def method_by_name(name: str) -> type[Method]:
    """The class behind `--method NAME`.

    Raises:
        RankwiseError: unknown name.
    """
    if name not in METHODS:
        raise RankwiseError("method", name, f"allowed: {', '.join(sorted(METHODS))}")
    return METHODS[name]
