"""A method and its options from text, as the command line has them."""

from dataclasses import Field, fields
from typing import Any

from rankwise.alloc.methods import method_by_name
from rankwise.alloc.methods.base import Method
from rankwise.errors import RankwiseError

SHARED = ("ratio", "kinds", "rank_multiple", "tolerance", "sides")  # have options of their own
WORDS = {"true": True, "false": False, "none": None}


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
    """Text in the type of the field's default; words, numbers and comma-joined numbers."""
    kind = str(field.type)
    if text.lower() in WORDS and ("bool" in kind or "None" in kind):
        return WORDS[text.lower()]
    try:
        if "tuple" in kind:
            return tuple(float(part) for part in text.split(","))
        if "int" in kind:
            return int(text)
        if "float" in kind:
            return float(text)
    except ValueError:
        raise RankwiseError(field.name, text, f"allowed: {kind}") from None
    if "bool" in kind:
        raise RankwiseError(field.name, text, "allowed: true, false")
    return text
