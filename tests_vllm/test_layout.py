"""Which part of a checkpoint's layer each of vLLM's layers holds, rank by rank."""

from typing import Any

import pytest
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from rankwise.engine.doors.vllm.layout import Layout
from rankwise.errors import RankwiseError
from rankwise.layerspec import LayerSpec


def layer(kind: type, rank: int, ranks: int, copies: int = 1) -> Any:
    """One of vLLM's layers, as far as a layout asks."""
    made = object.__new__(kind)
    made.tp_rank, made.tp_size, made.num_kv_head_replicas, made.prefix = rank, ranks, copies, "layers.0.it"
    return made


def spec(m: int, n: int = 64) -> LayerSpec:
    return LayerSpec("lowrank", m, n, 8, "fp32")


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_few_key_heads_go_to_several_ranks_each(rank: int) -> None:
    """Two key heads of 16 on four ranks."""
    found = Layout(layer(QKVParallelLinear, rank, 4, 2), "qkv", [spec(128), spec(32), None], 64, [32, 16, 16])
    assert found.cut(0).rows == ((32 * rank, 32 * rank + 32),)
    assert found.cut(1).rows == ((16 * (rank // 2), 16 * (rank // 2) + 16),)
    assert found.specs[2].out_features == 32
    assert [found.part(shard) for shard in ("q", "k", "v", 1)] == [0, 1, 2, 1]
    assert found.cut(0).columns == (0, 64)


def test_one_layer_on_disk_for_all_sections() -> None:
    found = Layout(layer(QKVParallelLinear, 1, 2), ["qkv_proj"], [spec(128 + 64)], 64, [64, 16, 16])
    assert found.cut(0).rows == ((64, 128), (144, 160), (176, 192))
    assert found.part(None) == 0


def test_fewer_layers_than_sections() -> None:
    """Three sections of the first layer, one of the second."""
    found = Layout(layer(MergedColumnParallelLinear, 1, 2), "ab", [spec(64), spec(48)], 64, [8, 8, 16, 24])
    assert found.cut(0).rows == ((8, 16), (24, 32), (48, 64))
    assert found.cut(1).rows == ((24, 48),)
    assert [found.part(shard) for shard in ((0, 1, 2), 3, 2)] == [0, 1, 0]


def test_inputs_are_split_where_outputs_are_not() -> None:
    found = Layout(layer(RowParallelLinear, 1, 2), ["o"], [spec(96)], 32, [96])
    assert (found.cut(0).rows, found.cut(0).columns, found.ranks) == (((0, 96),), (32, 64), 2)
    found = Layout(layer(ReplicatedLinear, 1, 2), ["o"], [spec(96)], 64, [96])
    assert (found.cut(0).rows, found.cut(0).columns, found.ranks) == (((0, 96),), (0, 64), 1)


def test_a_rank_has_its_share_of_the_channels_that_are_left() -> None:
    gate = LayerSpec("dense", 48, 64, 48, "fp32", dense_shape=(96, 64))
    found = Layout(layer(MergedColumnParallelLinear, 1, 2), "ab", [gate, None], 64, [48, 48])
    assert [found.cut(part).rows for part in (0, 1)] == [((24, 48),), ((48, 96),)]
    down = LayerSpec("lowrank", 64, 48, 8, "fp32", dense_shape=(64, 96))
    found = Layout(layer(RowParallelLinear, 1, 2), ["d"], [down], 48, [64])
    assert (found.cut(0).rows, found.cut(0).columns) == (((0, 64),), (24, 48))
    odd = LayerSpec("lowrank", 64, 47, 8, "fp32", dense_shape=(64, 96))
    found = Layout(layer(RowParallelLinear, 1, 2), ["d"], [odd], 48, [64])
    with pytest.raises(RankwiseError, match="d: 2 ranks, 47 channels; the ranks' number must divide"):
        found.cut(0)


class Unheard(ColumnParallelLinear):
    """A class that may be split in its own way."""


@pytest.mark.parametrize(
    ("kind", "names", "specs", "outputs", "message"),
    [
        (ColumnParallelLinear, ["a"], [spec(64)], [24], r"a: \[out, in\] = \[48, 64\] in vLLM's model; .* \[64, 64\]"),
        (Unheard, ["a"], [spec(64)], [32], "it: Unheard, split among 2 ranks; .* --tensor-parallel-size 1"),
        (MergedColumnParallelLinear, "ab", [spec(40), spec(72)], [8, 24, 24], "b: a part of .*it; .* not supported"),
        (MergedColumnParallelLinear, "ab", [None, spec(64)], [8, 24, 24], "a: a part of .*it; .* not supported"),
    ],
)
def test_refused(kind: type, names: list[str], specs: list[Any], outputs: list[int], message: str) -> None:
    with pytest.raises(RankwiseError, match=message):
        Layout(layer(kind, 0, 2), names, specs, 64, outputs)


def test_a_tensor_for_a_whole_fused_layer_is_refused() -> None:
    found = Layout(layer(MergedColumnParallelLinear, 0, 1), ["gate", "up"], [spec(64), spec(64)], 64, [64, 64])
    with pytest.raises(RankwiseError, match="it: a tensor for all of it"):
        found.part(None)
