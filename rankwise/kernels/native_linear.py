"""Layers that share an input by `native_linear.c`: one call for a group of any kinds and precisions.

At decode a product is a few microseconds of reading weights, and a call of the library costs as much again. The weights
are there once, in panels, for any number of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch.nn.functional import linear

from rankwise.kernels import native
from rankwise.kernels.backend import chosen
from rankwise.kernels.native_panels import CHUNK, ROWS, Matrix, Panels, panels_of, rows_of

MANY = 64  # tokens from which the library is faster on processors with AMX, which the function does not use


@dataclass(frozen=True)
class Layer:
    """A layer to be packed.

    Args:
        first: W, V or the pivots' basis, `[k, n]`.
        second: U or the pivots' coefficients, `[m, k]` or `[m - k, k]`; None for a dense layer.
        index: of a pivot layer, see `pivot_linear`.
        bias: `[m]` or None.
        outputs: m.
    """

    first: Matrix
    second: Matrix | None
    index: torch.Tensor | None
    bias: torch.Tensor | None
    outputs: int


@dataclass(frozen=True)
class Part:
    """One matrix of a group, and where its results go.

    Args:
        panels: the matrix.
        bias: of its rows, bf16, or None.
        to: int32, the place of each row among the layer's outputs; None: in order.
        out: the layer's first output; -1: its results are none.
        source: its first chunk among the inputs.
        keep: the first chunk of its results among the inputs of second factors; -1: they are none.
    """

    panels: Panels
    bias: torch.Tensor | None
    to: torch.Tensor | None
    out: int
    source: int
    keep: int

    def fields(self) -> list[int]:
        """`Matrix` of native_linear.c."""
        p = self.panels
        pointers = [0 if t is None else t.data_ptr() for t in (p.weights, p.levels, p.scales, self.bias, self.to)]
        sizes = [self.out, p.rows, p.chunks, p.chunks // p.groups, int(p.halves), int(p.shifted)]
        return [*pointers, *sizes, self.source, self.keep, p.bits]


@dataclass(frozen=True)
class HostGroup:
    """A group of layers as the function runs it, in bf16.

    Args:
        firsts: first factors.
        seconds: second factors.
        table: int64 `[parts, 14]`, all parts' fields.
        head: int64 `[7]`, `Group` of native_linear.h.
        inputs: n.
        outputs: Σ m.
        kept: chunks of a token that second factors read.
    """

    firsts: tuple[Part, ...]
    seconds: tuple[Part, ...]
    table: torch.Tensor
    head: torch.Tensor
    inputs: int
    outputs: int
    kept: int

    @property
    def place(self) -> None:
        """Outputs come in order: unlike those of `Packed`, pivot layers here may gate, too."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """All layers on one input, `[..., n]` to `[..., Σ m]`; bf16, without a gradient."""
        if x.shape[-1] != self.inputs:
            raise ValueError(f"inputs of {x.shape[-1]} features; the layers take {self.inputs}")
        flat = x if x.ndim == 2 else x.reshape(-1, self.inputs)
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        tokens = len(flat)
        if not native.usable(flat) or flat.dtype != torch.bfloat16 or (tokens >= MANY and native.has_tiles()):
            return self.reference(x)
        y = torch.empty((tokens, self.outputs), dtype=torch.bfloat16)
        work = self.inputs * self.outputs * tokens
        if tokens and native.call("linears", work, flat, y, self.head, tokens, flat.stride(0)):
            raise MemoryError("no memory for the inputs of second factors")
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.outputs)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The same by the library, on rows that are put together for the moment."""
        flat = x.reshape(prod(x.shape[:-1]), self.inputs)
        kept = flat.new_zeros(len(flat), self.kept * CHUNK)
        y = flat.new_empty(len(flat), self.outputs)
        for source, parts in ((flat, self.firsts), (kept, self.seconds)):
            for part in parts:
                p, start = part.panels, part.source * CHUNK
                z = linear(source[:, start : start + p.columns], rows_of(p))
                if part.keep >= 0:
                    kept[:, part.keep * CHUNK :][:, : p.rows] = z
                z = z if part.bias is None else z + part.bias
                if part.to is not None:
                    y[:, part.out + part.to.long()] = z
                elif part.out >= 0:
                    y[:, part.out : part.out + p.rows] = z
        return y.reshape(*x.shape[:-1], self.outputs)


def suits(layers: Sequence[Layer], dtype: torch.dtype) -> bool:
    """Whether the function can run layers for inputs of a dtype here."""
    matrices = [m for layer in layers for m in (layer.first, layer.second) if m is not None]
    plain = [m for m in matrices if isinstance(m, torch.Tensor)]
    codes = [m.codes for m in matrices if not isinstance(m, torch.Tensor)]
    if dtype != torch.bfloat16 or chosen() != "auto" or any(not t.is_cpu for t in (*plain, *codes)):
        return False
    found = native.library()
    return found is not None and all(m.dtype == dtype for m in plain) and (not codes or bool(found.has_four_bits()))


def host_group(layers: Sequence[Layer]) -> HostGroup:
    """Lay layers out; they are copied."""
    firsts, seconds, start, kept = [], [], 0, 0
    for layer in map(_ordered, layers):
        bias = None if layer.bias is None else layer.bias.bfloat16()
        first = panels_of(layer.first)
        if layer.second is None:
            firsts.append(Part(first, None if bias is None else bias.contiguous(), None, start, 0, -1))
        else:
            pivots, others = _places(layer, first.rows)
            bias_first, bias_second = _biases(bias, pivots, others)
            firsts.append(Part(first, bias_first, pivots, -1 if pivots is None else start, 0, kept))
            if others is None or len(others):
                seconds.append(Part(panels_of(layer.second), bias_second, others, start, kept, -1))
            kept += -(-first.rows // ROWS) * ROWS // CHUNK
        start += layer.outputs
    parts = [*firsts, *seconds]
    table = torch.tensor([part.fields() for part in parts], dtype=torch.int64)
    totals = max((part.panels.groups for part in parts if part.panels.shifted), default=0)
    inputs = firsts[0].panels.columns
    numbers = [table.data_ptr(), inputs, start, len(firsts), len(seconds), kept, totals]
    return HostGroup(tuple(firsts), tuple(seconds), table, torch.tensor(numbers), inputs, start, kept)


def _ordered(layer: Layer) -> Layer:
    """The same layer with pivots, and other rows, in the order of their outputs: results then lie close together."""
    first, second, index = layer.first, layer.second, layer.index
    if index is None or not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return layer
    pivots, others = (part.sort() for part in torch.argsort(index.long()).split([len(first), len(second)]))
    index = torch.argsort(torch.cat([pivots.values, others.values]))
    second = second[others.indices][:, pivots.indices]
    return replace(layer, first=first[pivots.indices], second=second, index=index)


def _places(layer: Layer, pivots: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Outputs of a pivot layer's pivots and of its other rows."""
    if layer.index is None:
        return None, None
    place = torch.argsort(layer.index.long()).to(torch.int32)
    return place[:pivots].contiguous(), place[pivots:].contiguous()


def _biases(
    bias: torch.Tensor | None, pivots: torch.Tensor | None, others: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if bias is None or pivots is None or others is None:
        return None, None if bias is None else bias.contiguous()
    return bias[pivots.long()], bias[others.long()]
