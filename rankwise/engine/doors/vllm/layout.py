"""Which layers of a checkpoint one of vLLM's linear layers is made of, and what this rank has of each."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from rankwise.engine.doors.vllm.shares import Cut
from rankwise.errors import RankwiseError
from rankwise.layerspec import LayerSpec

SPLIT_KNOWN = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
QKV = {"q": 0, "k": 1, "v": 2}


class Layout:
    """A linear layer of vLLM: sections of outputs, each split among ranks, and the checkpoint's layers they come from.

    Most fused layers have a section for each layer of the checkpoint; where the checkpoint's layer is fused itself
    (Phi-3's `qkv_proj`) it covers several.

    Args:
        layer: of vLLM.
        names: of the checkpoint's layers, in order.
        specs: of those; None for dense layers of which config.json says nothing.
        inputs: of this rank.
        outputs: of this rank, a section each.

    Raises:
        RankwiseError: sizes that do not fit, or a class of layers that is not split as those that we know.
    """

    def __init__(
        self, layer: Any, names: Sequence[str], specs: Sequence[LayerSpec | None], inputs: int, outputs: Sequence[int]
    ) -> None:
        self.layer, self.names, self.inputs, self.outputs = layer, names, inputs, outputs
        self.by_inputs = isinstance(layer, RowParallelLinear)
        if layer.tp_size > 1 and type(layer) not in SPLIT_KNOWN:
            what = f"{type(layer).__name__}, split among {layer.tp_size} ranks"
            raise RankwiseError(layer.prefix, what, "this kind of layer is not supported: --tensor-parallel-size 1")
        self.starts = self._starts(specs)
        self.specs = [spec or self._dense(part) for part, spec in enumerate(specs)]
        for part, spec in enumerate(self.specs):
            self._check(part, spec)

    def cut(self, part: int) -> Cut:
        """What this rank has of one of the checkpoint's layers."""
        rank, inputs = self.layer.tp_rank if self.by_inputs else 0, self._left(part, 1, self.inputs)
        rows, below = [], 0
        for section in self._sections(part):
            count, mine = self._split(section)
            size = self._left(part, 0, self.outputs[section])
            rows.append((below + mine * size, below + (mine + 1) * size))
            below += count * size
        return Cut(tuple(rows), (rank * inputs, (rank + 1) * inputs))

    def part(self, shard: Any) -> int:
        """Which of the checkpoint's layers a tensor belongs to, by what vLLM's loader calls its place."""
        section = shard[0] if isinstance(shard, tuple | list) else QKV.get(shard, shard)
        if section is None:
            section = 0
            if len(self.names) > 1:
                raise RankwiseError(self.layer.prefix, "a tensor for all of it", f"one each is expected: {self.names}")
        return max(part for part, start in enumerate(self.starts) if start <= section)

    @property
    def ranks(self) -> int:
        """Among which the inputs are split."""
        return self.layer.tp_size if self.by_inputs else 1

    def _left(self, part: int, axis: int, size: int) -> int:
        """What is left of a rank's outputs (axis 0) or inputs (1) where the layer has lost channels."""
        spec = self.specs[part]
        whole, now = spec.original_shape[axis], (spec.out_features, spec.in_features)[axis]
        if size * now % whole:
            what = f"{whole // size} ranks, {now} channels"
            raise RankwiseError(self.names[part], what, "the ranks' number must divide a layer's channels")
        return size * now // whole

    def _split(self, section: int) -> tuple[int, int]:
        """Among how many a section's outputs are split, and which is ours; few key heads go to several ranks each."""
        if self.by_inputs or isinstance(self.layer, ReplicatedLinear):
            return 1, 0
        copies = self.layer.num_kv_head_replicas if isinstance(self.layer, QKVParallelLinear) and section else 1
        return self.layer.tp_size // copies, self.layer.tp_rank // copies

    def _size(self, section: int) -> int:
        return self._split(section)[0] * self.outputs[section]

    def _sections(self, part: int) -> range:
        end = self.starts[part + 1] if part + 1 < len(self.starts) else len(self.outputs)
        return range(self.starts[part], end)

    def _starts(self, specs: Sequence[LayerSpec | None]) -> list[int]:
        """The first section of each of the checkpoint's layers."""
        if len(specs) == len(self.outputs):
            return list(range(len(specs)))
        if len(specs) == 1:
            return [0]
        ends = list(accumulate(self._size(section) for section in range(len(self.outputs))))
        starts, below = [], 0
        for name, spec in zip(self.names, specs, strict=True):
            if spec is None or (below and below not in ends):
                raise RankwiseError(name, f"a part of {self.layer.prefix}", "this fused layer is not supported")
            starts.append(ends.index(below) + 1 if below else 0)
            below += spec.original_shape[0]
        return starts

    def _dense(self, part: int) -> LayerSpec:
        m = sum(self._size(section) for section in self._sections(part))
        n = self.inputs * self.ranks
        return LayerSpec("dense", m, n, min(m, n))

    def _check(self, part: int, spec: LayerSpec) -> None:
        found = sum(self._size(section) for section in self._sections(part)), self.inputs * self.ranks
        wanted = spec.original_shape
        if found != wanted:
            what = f"[out, in] = {list(found)} in vLLM's model"
            raise RankwiseError(self.names[part], what, f"config.json says {list(wanted)}")
