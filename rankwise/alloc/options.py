"""A method and its options from text, as the command line has them."""

from collections.abc import Callable
from dataclasses import Field, fields
from types import NoneType, UnionType
from typing import Any, get_args

from rankwise.alloc.methods import method_by_name
from rankwise.alloc.methods.base import Method
from rankwise.errors import RankwiseError

SHARED = ("ratio", "kinds", "rank_multiple", "tolerance", "sides", "keep")  # have options of their own
PARSERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    str: (str, "a word"),
    tuple[float, ...]: (lambda text: tuple(float(part) for part in text.split(",")), "numbers joined by commas"),
}


def make_method(name: str, ratio: float, shared: dict[str, Any], settings: list[str]) -> Method:
    """Build a method.

    Args:
        name: of the method.
        ratio: share to keep.
        shared: the other options that all methods have; None is the method's own default. `kinds` is joined by commas.
        settings: `NAME=VALUE` each, for the options that only this method has.

    Raises:
        RankwiseError: unknown method or option, or a value of the wrong type.
    """
    made = method_by_name(name)
    given = {key: value for key, value in shared.items() if value is not None}
    if "kinds" in given:
        given["kinds"] = tuple(given["kinds"].split(","))
    if "keep" in given:
        given["keep"] = tuple(given["keep"])
    own = own_options(made)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in own:
            raise RankwiseError("set", setting, f"NAME=VALUE, for {name} NAME is one of: {', '.join(own) or 'none'}")
        given[key] = _value(own[key], text)
    return made(ratio=ratio, **given)


def own_options(method: type[Method]) -> dict[str, "Field[Any]"]:
    """Name to dataclass field of the options that `--set` takes."""
    return {f.name: f for f in fields(method) if f.name not in SHARED}


def _value(field: "Field[Any]", text: str) -> Any:
    """Text in the field's own type."""
    kinds: tuple[Any, ...] = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
    if NoneType in kinds and text.lower() == "none":
        return None
    parse, allowed = PARSERS[next(kind for kind in kinds if kind is not NoneType)]
    try:
        return parse(text)
    except (ValueError, KeyError):
        more = " or none" if NoneType in kinds else ""
        raise RankwiseError(field.name, text, f"allowed: {allowed}{more}") from None
