"""One allocation method a file, one protocol (`base.Method`)."""

from rankwise.alloc.methods.base import Method
from rankwise.alloc.methods.lagrange import Global
from rankwise.alloc.methods.uniform import Uniform
from rankwise.errors import RankwiseError

METHODS: dict[str, type[Method]] = {method.name: method for method in (Global, Uniform)}


def method_by_name(name: str) -> type[Method]:
    """The class behind `--method NAME`.

    Raises:
        RankwiseError: unknown name.
    """
    if name not in METHODS:
        raise RankwiseError("method", name, f"allowed: {', '.join(sorted(METHODS))}")
    return METHODS[name]
