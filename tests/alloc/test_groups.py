"""Types are places in a block."""

from collections.abc import Callable
from typing import Any

from rankwise.alloc.groups import by_type, layer_type
from rankwise.anatomy import block_linears


def test_numbers_are_no_part_of_a_type() -> None:
    assert layer_type("model.layers.3.self_attn.q_proj") == "model.layers.self_attn.q_proj"
    assert layer_type("model.layers.3.mlp.experts.17.w1") == "model.layers.mlp.experts.w1"
    assert layer_type("layer3") == "layer3"


def test_a_type_has_one_layer_a_block_in_order(family: str, tiny: Callable[..., Any]) -> None:
    blocks = block_linears(tiny(family))
    groups = by_type(name for block in blocks for name in block)
    assert list(groups.values()) == [list(names) for names in zip(*blocks, strict=True)]


def test_equal_last_names_in_different_places_are_different_types() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj"]
    assert by_type(names) == {"h.attn.c_proj": names[::2], "h.mlp.c_proj": names[1::2]}
