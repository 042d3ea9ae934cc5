"""Which layers are of one type: the same place in their blocks, whatever the block's (or expert's) number."""

from collections.abc import Iterable


def layer_type(name: str) -> str:
    """A module name without its numbers: `model.layers.3.self_attn.q_proj` to `model.layers.self_attn.q_proj`."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def by_type(names: Iterable[str]) -> dict[str, list[str]]:
    """Type to the names of its layers, both in the order given."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_type(name), []).append(name)
    return groups
