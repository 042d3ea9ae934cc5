"""Refit: solve the factors again for the inputs that the compressed model really produces, block by block.

A layer's factors were chosen for the inputs and outputs of the dense model. Once the layers before it are compressed
its inputs are others, `x'` where they were `x`. The refit goes through the model in the order of its computation and
gives each layer the matrix of its rank that best repeats what the dense model did there:

    minimise  E ‖F^½ (t - Ŵ x')‖²,   t = W x + e,

where e is what the residual stream has lost so far, for layers that write to it (the compressed sum is short of the
dense one by e), and 0 for others. Without the rank the optimum is `W + a D C'⁻¹` at a = 1, with `C' = E[x' x'ᵀ]` and
`D = E[t x'ᵀ] - W C'`. That estimate is noisy where text is short, so a is the share for which the loss on held-out
windows is least; the result is truncated to the rank in the metric of F and C'. The old factors stay wherever the
held-out loss did not fall.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.alloc.curvature import Curvature
from rankwise.alloc.factors import factorize
from rankwise.alloc.layout import Layout, learn_layout
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore
from rankwise.alloc.stream import BlockStream
from rankwise.anatomy import block_linears, weight_of
from rankwise.plan import LayerSpec, RankPlan
from rankwise.progress import Track, silent

RIDGE = 1e-4  # of the mean eigenvalue of C', added before it is inverted


@dataclass
class Moments:
    """Sums over one set of windows at one group of layers that share an input.

    Args:
        compressed: `Σ x' x'ᵀ` `[n, n]`.
        cross: `Σ x x'ᵀ` `[n, n]`.
        lost: `Σ e x'ᵀ` `[m, n]`; None for layers that do not write to the residual stream.
        tokens: how many were added.
    """

    compressed: torch.Tensor
    cross: torch.Tensor
    lost: torch.Tensor | None
    tokens: int = 0

    def add(self, dense: torch.Tensor, compressed: torch.Tensor, lost: torch.Tensor | None) -> None:
        """One window's inputs `[T, n]` of both models, and what the residual stream has lost `[T, m]`."""
        dense, compressed = dense.float(), compressed.float()
        self.compressed.addmm_(compressed.T, compressed)
        self.cross.addmm_(dense.T, compressed)
        if lost is not None and self.lost is not None:
            self.lost.addmm_(lost.float().T, compressed)
        self.tokens += len(dense)

    def inputs(self) -> torch.Tensor:
        """C' `[n, n]` fp64."""
        return self.compressed.double() / self.tokens

    def targets(self, weight: torch.Tensor) -> torch.Tensor:
        """`E[t x'ᵀ]` `[m, n]` fp64."""
        total = weight @ self.cross.double()
        return (total if self.lost is None else total + self.lost.double()) / self.tokens


@dataclass
class Outcome:
    """What became of one layer.

    Args:
        share: how far it moved towards the least-squares solution; None if its old factors stayed.
        gain: by how much the held-out loss fell, nats a token by the quadratic model.
    """

    share: float | None
    gain: float


@dataclass
class _Pass:
    """Hidden states of both models on their way through the blocks."""

    stream: BlockStream
    windows: torch.Tensor
    fitted: int
    dense: list[torch.Tensor] = field(default_factory=list)
    compressed: list[torch.Tensor] = field(default_factory=list)

    def start(self) -> None:
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
    """
    linears = block_linears(model)
    stream = BlockStream(model, device, windows[:1])
    run = _Pass(stream, torch.cat([windows, held_out]), len(windows))
    try:
        run.start()
        with track("refit", len(stream)) as advance:
            for index, block in enumerate(linears):
                if not into.file(index).exists():
                    outputs = curvature.outputs(index) if curvature.has_outputs else {}
                    specs = {name: plan.layers[name] for name in block}
                    into.write(index, *_refit_block(run, index, block, specs, factors, outputs))
                _forward(run, index, block, into.weights(index))
                advance()
    finally:
        stream.close()
    return into


def _refit_block(
    run: _Pass,
    index: int,
    block: dict[str, nn.Module],
    specs: dict[str, LayerSpec],
    factors: FactorStore,
    outputs: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, Outcome]]:
    """New tensors (`NAME.u`, `NAME.v`, or `NAME.weight` of a dense layer) and what was found, of one block."""
    stream = run.stream
    with stream.on_device(index):
        layout = learn_layout(stream, index, block, run.dense[0].to(stream.device))
        weights: dict[str, torch.Tensor] = {}
        tensors: dict[str, torch.Tensor] = {}
        outcomes: dict[str, Outcome] = {}
        for group in layout.groups:
            fit, judge = _gather(run, index, block, layout, group, weights)
            for name in group:
                dense, spec = weight_of(block[name]).double(), specs[name]
                old = None if spec.kind == "dense" else factors.load(name, spec.rank, spec.indices)
                new, outcomes[name] = _refit_layer(dense, spec, old, fit, judge, outputs.get(name))
                tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in new.items()}
                if new:
                    weights[name] = new["weight"] if "weight" in new else new["u"] @ new["v"]
    return tensors, outcomes


def _gather(
    run: _Pass,
    index: int,
    block: dict[str, nn.Module],
    layout: Layout,
    group: list[str],
    weights: dict[str, torch.Tensor],
) -> tuple[Moments, Moments]:
    """Moments at one group's input over the windows to fit to and those that judge."""
    m, n = weight_of(block[group[0]]).shape
    writes, device = group[0] in layout.residual, run.stream.device
    both = []
    for _ in range(2):
        lost = torch.zeros(m, n, device=device) if writes else None
        both.append(Moments(torch.zeros(n, n, device=device), torch.zeros(n, n, device=device), lost))
    for number, (dense, compressed) in enumerate(zip(run.dense, run.compressed, strict=True)):
        x, r = layout.grab(run.stream, index, group[0], dense.to(device))
        with swapped(block, weights):
            x_, r_ = layout.grab(run.stream, index, group[0], compressed.to(device))
        lost = None if r is None or r_ is None else r.float() - r_.float()
        both[int(number >= run.fitted)].add(x, x_, lost)
    return both[0], both[1]


def _refit_layer(
    dense: torch.Tensor,
    spec: LayerSpec,
    old: tuple[torch.Tensor, torch.Tensor] | None,
    fit: Moments,
    judge: Moments,
    outputs: torch.Tensor | None,
) -> tuple[dict[str, torch.Tensor], Outcome]:
    """The new factors if they lower the held-out loss, else the old; an empty dict for a dense layer left as it is."""
    inputs, c, t = fit.inputs(), judge.inputs(), judge.targets(dense)
    f = None if outputs is None else outputs.to(dense.device).double()
    ridge = RIDGE * inputs.diagonal().mean().clamp_min(1e-30) * torch.eye(len(inputs)).to(inputs)
    step = torch.linalg.solve(inputs + ridge, (fit.targets(dense) - dense @ inputs).T).T
    share = _best_share(dense, step, f, c, t)
    new = _truncated(dense + share * step, spec, inputs, outputs)
    first = {"u": old[0].to(dense.device), "v": old[1].to(dense.device)} if old else {}
    before = _loss(_product(first) if first else dense, f, c, t)
    after = _loss(_product(new), f, c, t)
    return (new, Outcome(share, before - after)) if after < before else (first, Outcome(None, 0.0))


def _best_share(
    dense: torch.Tensor, step: torch.Tensor, f: torch.Tensor | None, c: torch.Tensor, t: torch.Tensor
) -> float:
    """The a in [0, 1] for which `W + a S` has the least held-out loss, which is a parabola in a."""
    weighted = step if f is None else f @ step
    rise, curve = float((weighted * (t - dense @ c)).sum()), float((weighted * (step @ c)).sum())
    return min(1.0, max(0.0, rise / curve)) if curve > 0 else 0.0


def _product(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["weight"].double() if "weight" in tensors else tensors["u"].double() @ tensors["v"].double()


def _truncated(
    weight: torch.Tensor, spec: LayerSpec, inputs: torch.Tensor, outputs: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    if spec.kind == "dense":
        return {"weight": weight.float()}
    found = factorize(weight, inputs, outputs)
    return {"u": found.u[:, : spec.rank].contiguous(), "v": found.v[: spec.rank].contiguous()}


def _loss(weight: torch.Tensor, f: torch.Tensor | None, c: torch.Tensor, t: torch.Tensor) -> float:
    """`½ E‖F^½ (t - Ŵ x')‖²` less its constant part, nats a token."""
    inner = (weight @ c) @ weight.T - 2 * weight @ t.T
    return float(inner.trace() if f is None else (f * inner).sum()) / 2


def _forward(run: _Pass, index: int, block: dict[str, nn.Module], weights: dict[str, torch.Tensor]) -> None:
    """Both models' hidden states through the block that is done."""
    stream = run.stream
    with stream.on_device(index):
        for number, (dense, compressed) in enumerate(zip(run.dense, run.compressed, strict=True)):
            run.dense[number] = stream.run(index, dense.to(stream.device)).cpu()
            with swapped(block, weights):
                run.compressed[number] = stream.run(index, compressed.to(stream.device)).cpu()


@contextmanager
def swapped(block: dict[str, nn.Module], weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Other weights `[m, n]` in the named layers while the context lasts."""
    kept: dict[str, torch.Tensor] = {}
    try:
        for name, weight in weights.items():
            module: Any = block[name]
            kept[name] = module.weight.data
            data = weight.to(kept[name])
            module.weight.data = data.T.contiguous() if isinstance(module, Conv1D) else data
        yield
    finally:
        for name, data in kept.items():
            module = block[name]
            module.weight.data = data
