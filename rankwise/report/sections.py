"""Provenance as tables."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HEADS = {"candidates": "candidates: loss, nats a token"}  # where a key alone says too little


def sections(provenance: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Nested data as headed lists of dotted names and values; what is not nested comes first, without a head.

    A list of mappings, such as the candidates of a budget of bytes, has a row for each.
    """
    nested = {key: value for key, value in provenance.items() if value and _is_nested(value)}
    flat = {key: value for key, value in provenance.items() if key not in nested}
    parts = [("", flat), *nested.items()] if flat else list(nested.items())
    return [
        (HEADS.get(head, str(head)), list(_leaves(part) if isinstance(part, Mapping) else _items(part)))
        for head, part in parts
    ]


def _is_nested(data: Any) -> bool:
    return isinstance(data, Mapping) or _is_table(data)


def _is_table(data: Any) -> bool:
    """True for a list of mappings that hold nothing nested."""
    nested = (Mapping, list, tuple)
    return isinstance(data, list | tuple) and all(
        isinstance(item, Mapping) and not any(isinstance(value, nested) for value in item.values()) for item in data
    )


def _items(table: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each mapping as what it is of (or its number, from 1) and the rest."""
    for number, item in enumerate(table, 1):
        rest = ", ".join(f"{key} {_word(value)}" for key, value in item.items() if key != "of")
        yield _word(item.get("of", number)), rest


def _word(value: Any) -> str:
    return "not known" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _leaves(data: Any, path: str = "", depth: int = 8) -> Iterator[tuple[str, str]]:
    if isinstance(data, Mapping) and data and depth:
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key), depth - 1)
    elif isinstance(data, list | tuple) and data and not any(isinstance(v, Mapping | list | tuple) for v in data):
        yield path, ", ".join(str(value) for value in data)
    else:
        yield path, data if isinstance(data, str) else json.dumps(data, default=str, ensure_ascii=False)
