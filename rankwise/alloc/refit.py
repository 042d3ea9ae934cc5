"""Refit: solve the factors again for the inputs that the compressed model really produces, block by block.

A layer's factors were chosen for the inputs and outputs of the dense model. Once the layers before it are compressed
its inputs are others. The refit goes through both models in the order of their computation and gives each layer the
matrix of its rank that best repeats what the dense model did there (`alloc.solve`). Layers that write to the residual
stream make up for what it has lost so far.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rankwise.alloc.channels import among
from rankwise.alloc.curvature import Curvature
from rankwise.alloc.layout import Layout, learn_layout
from rankwise.alloc.mlps import swapped
from rankwise.alloc.moments import octaves
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.solve import Moments, Outcome, Tensors, product, refit_layer
from rankwise.alloc.store import FactorStore
from rankwise.alloc.stream import BlockStream
from rankwise.anatomy import block_linears, weight_of
from rankwise.errors import RankwiseError
from rankwise.plan import LayerSpec, RankPlan
from rankwise.progress import Track, silent


@dataclass
class _Pass:
    """Hidden states of both models on their way through the blocks.

    Args:
        stream: the dense model.
        windows: `[N, T]` token ids.
        fitted: so many of the windows, from the first, are fitted to; the others judge.
        dense: per window `[1, T, d]`, in host memory.
        compressed: likewise, of the compressed model.
    """

    stream: BlockStream
    windows: torch.Tensor
    fitted: int
    dense: list[torch.Tensor] = field(default_factory=list)
    compressed: list[torch.Tensor] = field(default_factory=list)

    def start(self) -> None:
        """The embeddings, which both models share."""
        self.dense = [self.stream.embed(window[None]) for window in self.windows]
        self.compressed = [hidden.clone() for hidden in self.dense]


@torch.no_grad()
def refit(
    model: Any,
    plan: RankPlan,
    factors: FactorStore,
    curvature: Curvature,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    into: Refitted,
    *,
    device: torch.device,
    track: Track = silent,
) -> Refitted:
    """Refit every layer of a plan, or finish what `into` holds of it.

    Args:
        model: the dense model, in host memory; it is left as it was.
        plan: kinds and ranks; they do not change.
        factors: the factors as they are.
        curvature: with output-gradient moments; without them F is the identity.
        windows: `[N, T]` token ids to fit to.
        held_out: `[M, T]` token ids that judge; none of them may be among `windows`.
        into: where the new factors go, one block a file.
        device: where blocks compute.
        track: progress.

    Raises:
        RankwiseError: no windows, or NaN or Inf in the compressed model's activations.
    """
    for what, some in (("windows", windows), ("held-out windows", held_out)):
        if not len(some):
            raise RankwiseError(what, 0, "a refit needs at least 1")
    linears = block_linears(model)
    if all(into.file(index).exists() for index in range(len(linears))):
        return into
    stream = BlockStream(model, device, windows[:1])
    run = _Pass(stream, torch.cat([windows, held_out]), len(windows))
    try:
        run.start()
        with track("refit", len(stream)) as advance:
            for index, block in enumerate(linears):
                if not into.file(index).exists():
                    specs = {name: plan.layers[name] for name in block}
                    into.write(index, *_refit_block(run, index, block, specs, factors, curvature))
                _forward(run, index, block, into)
                advance()
    finally:
        stream.close()
    return into


@dataclass(frozen=True)
class _Block:
    """One block on its way through the refit.

    Args:
        index: which.
        linears: name to layer.
        specs: what the layers become.
        layout: how they hang together.
        rows: layer to the outputs that it keeps, where it has lost some.
        emphasis: layer to what its tokens weigh `[T]`; without any, a group shares its sums.
    """

    index: int
    linears: dict[str, nn.Module]
    specs: dict[str, LayerSpec]
    layout: Layout
    rows: Tensors
    emphasis: dict[str, torch.Tensor]


def _refit_block(
    run: _Pass,
    index: int,
    linears: dict[str, nn.Module],
    specs: dict[str, LayerSpec],
    factors: FactorStore,
    curvature: Curvature,
) -> tuple[dict[str, Tensors], dict[str, Outcome]]:
    """New tensors of one block's layers, and what became of each. Layers that the text misses keep their factors."""
    stream, outputs = run.stream, curvature.outputs(index)
    places = octaves(run.windows.shape[1], stream.device)
    emphasis = {name: share.to(stream.device)[places] for name, share in curvature.emphasis(index).items()}
    found = {name: old_tensors(factors, name, spec, weight_of(linears[name])) for name, spec in specs.items()}
    outcomes = {name: Outcome() for name in linears}
    with stream.on_device(index):
        layout = learn_layout(stream, index, linears, run.dense[0].to(stream.device))
        block = _Block(index, linears, specs, layout, _rows(factors, linears), emphasis)
        reached = {name for group in layout.groups for name in group}
        weights = {name: product(old) for name, old in found.items() if old and name not in reached}
        for group in layout.groups:
            sums = _gather(run, block, group, weights)
            for name in group:
                dense = weight_of(linears[name])
                rows = block.rows.get(name)
                teacher = dense if rows is None else dense[rows.to(dense.device)]
                with _named(name):
                    found[name], outcomes[name] = refit_layer(
                        factors.weight(name, dense).double(),
                        specs[name],
                        found[name],
                        *sums[name],
                        among(outputs[name], rows) if name in outputs else None,
                        teacher.double(),
                    )
                if found[name]:
                    weights[name] = product(found[name])
    return found, outcomes


def _rows(factors: FactorStore | Refitted, names: Iterable[str]) -> Tensors:
    """Layer to the outputs that it keeps, of those that have lost some."""
    return {name: rows for name in names if (rows := factors.rows(name)) is not None}


def old_tensors(factors: FactorStore, name: str, spec: LayerSpec, dense: torch.Tensor) -> Tensors:
    """A layer's factors as they are; of one that stays dense what is left of its weight, nothing if all is."""
    if spec.kind == "dense":
        return {} if spec.dense_shape is None else {"weight": factors.weight(name, dense).float()}
    return dict(zip(("u", "v"), factors.load(name, spec.rank, spec.indices), strict=True))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors inside say which layer they are about."""
    try:
        yield
    except RankwiseError as error:
        raise RankwiseError(f"{name}: {error.field}", error.value, error.allowed) from None


def _gather(run: _Pass, block: _Block, group: list[str], weights: Tensors) -> dict[str, tuple[Moments, Moments]]:
    """Moments of one group's layers, over the windows to fit to and those that judge.

    Args:
        run: hidden states at the block's input.
        block: on the device.
        group: layers that share an input.
        weights: what the compressed model has in the place of the layers before the group.
    """
    stream, layout, leader = run.stream, block.layout, group[0]
    heard = group if block.emphasis else [leader]
    sums = {name: _zeros(block.specs[name], leader in layout.residual, stream.device) for name in heard}
    for number, (dense, compressed) in enumerate(zip(run.dense, run.compressed, strict=True)):
        wanted = layout.grab(stream, block.index, leader, dense.to(stream.device))
        with swapped(block.linears, weights, block.rows):
            given = layout.grab(stream, block.index, leader, compressed.to(stream.device))
        if wanted is None or given is None:
            continue
        (x, stream_was), (x_, stream_is) = wanted, given
        lost = None if stream_was is None or stream_is is None else stream_was.float() - stream_is.float()
        for name, pair in sums.items():
            pair[number >= run.fitted].add(x, x_, lost, block.emphasis.get(name))
    return {name: sums[name if block.emphasis else leader] for name in group}


def _zeros(spec: LayerSpec, writes: bool, device: torch.device) -> tuple[Moments, Moments]:
    """To fit to, and to judge by."""
    sizes = spec.out_features, spec.in_features, spec.original_shape[1]
    return Moments.zeros(*sizes, writes=writes, device=device), Moments.zeros(*sizes, writes=writes, device=device)


def _forward(run: _Pass, index: int, block: dict[str, nn.Module], done: Refitted) -> None:
    """Both models' hidden states through the block that is done."""
    stream, weights = run.stream, done.weights(index)
    rows = _rows(done, weights)
    with stream.on_device(index):
        for number, (dense, compressed) in enumerate(zip(run.dense, run.compressed, strict=True)):
            run.dense[number] = stream.run(index, dense.to(stream.device)).cpu()
            with swapped(block, weights, rows):
                run.compressed[number] = stream.run(index, compressed.to(stream.device)).cpu()
