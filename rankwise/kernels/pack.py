"""Groups of linear layers that share an input, laid out for `packed.py`: stacked first factors, a table of tiles."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch
from torch.nn.functional import rms_norm, silu

from rankwise.errors import RankwiseError
from rankwise.kernels import native
from rankwise.kernels.backend import use_triton
from rankwise.kernels.expand import FIELDS, TILE
from rankwise.kernels.host import host_linear, prepare
from rankwise.kernels.members import Member, Pivot
from rankwise.kernels.packed import MOST_TOKENS, packed
from rankwise.kernels.swiglu import swiglu as gated_activation

ALIGN = 8  # elements; 16 bytes in 16-bit dtypes


@dataclass(frozen=True)
class Packed:
    """A group as `packed_linear` runs it.

    Args:
        first: `[R, n]`, the members' first factors, one below the other.
        second: flat, the members' second factors, one after another.
        seconds: the same, each as a matrix, without those that have no rows.
        table: int32 `[tiles, FIELDS]`, see `table_of`.
        place: int32 `[Σ m]` output of each row of the tiles, or None where that is their order.
        index: its inverse.
        bias: `[Σ m]` or None.
        shapes: per member, outputs, rank and rows of its second factor.
        alike: two members whose tiles lie alike: one may gate the other.
    """

    first: torch.Tensor
    second: torch.Tensor
    seconds: tuple[torch.Tensor, ...]
    table: torch.Tensor
    place: torch.Tensor | None
    index: torch.Tensor | None
    bias: torch.Tensor | None
    shapes: tuple[tuple[int, int, int], ...]
    alike: bool

    @property
    def outputs(self) -> list[int]:
        """m of each member."""
        return [outputs for outputs, _, _ in self.shapes]

    @property
    def align(self) -> int:
        """What the table's offsets and ranks count in."""
        return alignment(self.shapes)


def pack(members: Sequence[Member], biases: Sequence[torch.Tensor | None] | None = None) -> Packed:
    """Lay layers out as a group; the tensors are copied.

    Args:
        members: at least one, all with the same n, dtype and device.
        biases: per member `[m]` or None.

    Raises:
        RankwiseError: the members do not share n, dtype and device.
    """
    inputs = {(m.first.shape[1], m.first.dtype, m.first.device) for m in members}
    if len(inputs) != 1:
        raise RankwiseError("members", sorted(map(str, inputs)), "layers with one input size, dtype and device")
    shapes = tuple((m.outputs, len(m.first), len(m.second)) for m in members)
    if any(rank == 0 for _, rank, _ in shapes):
        raise RankwiseError("members", "a factor of rank 0", "ranks from 1")
    device = members[0].first.device
    place = index = bias = None
    if any(isinstance(member, Pivot) for member in members):
        starts = [sum(outputs for outputs, _, _ in shapes[:i]) for i in range(len(shapes))]
        index = torch.cat([_index(m).long() + start for m, start in zip(members, starts, strict=True)])
        place = torch.argsort(index).to(torch.int32)
    if biases is not None and any(given is not None for given in biases):
        zeros = [m.first.new_zeros(m.outputs) for m in members]
        bias = torch.cat([zero if b is None else b for b, zero in zip(biases, zeros, strict=True)])
    first = torch.cat([member.first for member in members])
    second = torch.cat([member.second.reshape(-1) for member in members])
    sizes = [rank * rows for _, rank, rows in shapes]
    parts = [flat.view(rows, rank) for flat, (_, rank, rows) in zip(second.split(sizes), shapes, strict=True) if rows]
    alike = len(shapes) == 2 and _tiles(shapes[0]) == _tiles(shapes[1])
    return Packed(first, second, tuple(parts), table_of(shapes, device), place, index, bias, shapes, alike)


def prepared(group: Packed) -> Packed:
    """The group for long use where it is: on a CPU its weights are put in the order of the library's products."""
    first, seconds = prepare(group.first), tuple(prepare(part) for part in group.seconds)
    changed = any(part.is_mkldnn for part in (first, *seconds))
    return replace(group, first=first, second=group.second[:0], seconds=seconds) if changed else group


def _index(member: Member) -> torch.Tensor:
    if isinstance(member, Pivot):
        return member.index
    return torch.arange(member.outputs, device=member.first.device)


def alignment(shapes: Sequence[tuple[int, int, int]]) -> int:
    """8 if that divides every rank, 1 otherwise."""
    return ALIGN if all(rank % ALIGN == 0 for _, rank, rows in shapes if rows) else 1


Shapes = tuple[tuple[int, int, int], ...]


def table_of(shapes: Shapes, device: torch.device) -> torch.Tensor:
    """`entries` as int32 `[tiles, FIELDS]`, made once for each device."""
    key = shapes, device
    if key in _tables:
        return _tables[key]
    table = torch.tensor(entries(shapes), dtype=torch.int32, device=device).reshape(-1, FIELDS)
    if type(table) is torch.Tensor:  # no tensor of a tracer, that must not outlive its trace
        _tables[key] = table
    return table


_tables: dict[tuple[Shapes, torch.device], torch.Tensor] = {}


@lru_cache(maxsize=1024)
def entries(shapes: Shapes) -> tuple[tuple[int, ...], ...]:
    """One row a tile of at most 32 outputs: what one program of the second kernel does.

    Fields: where the tile's part of the second factors starts, and its rank (0: copy), both counted in `alignment`
    elements; its first component among all R; its number of outputs; its first row among all Σ m.

    Args:
        shapes: per member, outputs, rank and rows of the second factor. Outputs without such a row are copies.
    """
    unit, tiles = alignment(shapes), []
    component = offset = output = 0
    for outputs, rank, rows in shapes:
        copies = outputs - rows
        for start in range(0, copies, TILE):
            tiles.append((0, 0, component + start, min(TILE, copies - start), output + start))
        for start in range(0, rows, TILE):
            count = min(TILE, rows - start)
            tiles.append(((offset + start * rank) // unit, rank // unit, component, count, output + copies + start))
        component, offset, output = component + rank, offset + rows * rank, output + outputs
    return tuple(tiles)


def packed_linear(
    x: torch.Tensor,
    group: Packed,
    residual: torch.Tensor | None = None,
    *,
    swiglu: bool = False,
    eps: float | None = None,
) -> torch.Tensor:
    """All layers of a group on one input.

    Args:
        x: `[..., n]` in the group's dtype.
        group: of `pack`.
        residual: `[..., outputs]`, added to the result.
        swiglu: the group is a gate and an up projection without pivots; returns `silu(gate) ⊙ up`.
        eps: apply RMSNorm without weight to x first (fold its weight into the first factors). In Triton the norm is
            applied to the result, of which that is only a factor for each token.

    Returns:
        `[..., Σ m]`, the members' outputs side by side; with `swiglu` `[..., m]`.

    Raises:
        RankwiseError: `swiglu` of another group.
    """
    if swiglu and (len(group.shapes) != 2 or len(set(group.outputs)) != 1 or group.place is not None):
        raise RankwiseError("swiglu", group.shapes, "two layers, dense or lowrank, with the same number of outputs")
    gated = swiglu and group.alike
    if not few_tokens(x, group.first, group.second, group.bias, residual) or gated != swiglu:
        return packed_reference(x, group, residual, swiglu=swiglu, eps=eps)
    if eps is not None and x.dtype == torch.float16:  # what the first factors make of an input as it is may overflow
        x, eps = rms_norm(x, x.shape[-1:], eps=eps), None
    outputs = group.outputs[0] if gated else sum(group.outputs)
    flat = rows_of(x)
    beside = None if residual is None else residual.reshape(len(flat), outputs).contiguous()
    tensors = flat, group.first, group.second, group.table, group.place, group.bias, beside
    return packed(*tensors, outputs, group.align, gated, eps).reshape(*x.shape[:-1], outputs)


def few_tokens(x: torch.Tensor, first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the kernels for a few tokens run: in Triton, 1 to 64 tokens, a rank above 0, and no gradient wanted."""
    tensors = [tensor for tensor in (x, first, *others) if tensor is not None]
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not wanted and use_triton(x) and 0 < prod(x.shape[:-1]) <= MOST_TOKENS and len(first) > 0


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`[..., n]` as `[T, n]`, its last dimension contiguous."""
    flat = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _tiles(shape: tuple[int, int, int]) -> list[int]:
    """Where a member's tiles start."""
    return [entry[4] for entry in entries((shape,))]


def packed_reference(
    x: torch.Tensor,
    group: Packed,
    residual: torch.Tensor | None = None,
    *,
    swiglu: bool = False,
    eps: float | None = None,
) -> torch.Tensor:
    """`packed_linear` in PyTorch, by the library's products; what prefill runs on every device."""
    if eps is not None:
        x = rms_norm(x, x.shape[-1:], eps=eps)
    if not group.seconds:  # all dense: one product is all
        return _finish(host_linear(x, group.first, group.bias), residual, swiglu=swiglu)
    z, seconds = host_linear(x, group.first), iter(group.seconds)
    parts, component = [], 0
    for outputs, rank, rows in group.shapes:
        mine = z[..., component : component + rank]
        if outputs > rows:
            parts.append(mine[..., : outputs - rows])
        if rows:
            parts.append(host_linear(mine, next(seconds)))
        component += rank
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    y = y if group.index is None else y.index_select(-1, group.index)
    y = y if group.bias is None else y + group.bias
    return _finish(y, residual, swiglu=swiglu)


def _finish(y: torch.Tensor, residual: torch.Tensor | None, *, swiglu: bool) -> torch.Tensor:
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = gated_activation(gate, up) if native.usable(gate, up) else silu(gate) * up
    return y if residual is None else y + residual
