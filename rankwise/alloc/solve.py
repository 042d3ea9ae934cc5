"""The refit of one layer in closed form: the matrix of its rank that best repeats the dense model's output there.

    minimise  E ‖F^½ (t - Ŵ x')‖²,   t = W x + e,

over matrices Ŵ of the plan's rank, from moments alone: x is the layer's input in the dense model, x' in the
compressed one, e what the residual stream has lost so far. Tokens may be weighted (`Curvature.emphasis`). Without the
rank the optimum is `W + a D C'⁻¹` at a = 1, with `C' = E[x' x'ᵀ]` and `D = E[t x'ᵀ] - W C'`. That estimate is noisy
where text is short, so a is the share for which the loss on held-out windows is least; the result is truncated to the
rank in the metric of F and C'. The old factors stay wherever the held-out loss did not fall.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from rankwise.alloc.factors import factorize
from rankwise.errors import overflown
from rankwise.plan import LayerSpec

RIDGE = 1e-4  # of the mean eigenvalue of C', added before it is inverted
ROUNDING = 1e-8  # share of the loss; less than that is no gain, but the rounding of moments and factors

Tensors = dict[str, torch.Tensor]


@dataclass
class Moments:
    """Sums over one set of windows at one group of layers that share an input.

    Args:
        compressed: `Σ x' x'ᵀ` `[n, n]`.
        cross: `Σ x x'ᵀ` `[n₀, n]`; the dense model's layer has n₀ inputs.
        lost: `Σ e x'ᵀ` `[m, n]`; None for layers that do not write to the residual stream.
        tokens: how many were added, or the sum of their weights.
    """

    compressed: torch.Tensor
    cross: torch.Tensor
    lost: torch.Tensor | None
    tokens: float = 0

    @classmethod
    def zeros(
        cls,
        out_features: int,
        in_features: int,
        dense_inputs: int | None = None,
        *,
        writes: bool,
        device: torch.device,
    ) -> "Moments":
        """No tokens yet; `writes` for a layer that writes to the residual stream, `dense_inputs` where n₀ is not n."""
        lost = torch.zeros(out_features, in_features, device=device) if writes else None
        square = torch.zeros(in_features, in_features, device=device)
        return cls(square, torch.zeros(dense_inputs or in_features, in_features, device=device), lost)

    def add(
        self,
        dense: torch.Tensor,
        compressed: torch.Tensor,
        lost: torch.Tensor | None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """One window's inputs `[T, n]` of both models, what the residual stream has lost `[T, m]`, weights `[T]`."""
        dense, compressed = dense.float(), compressed.float()
        counted = compressed if weights is None else compressed * weights[:, None]
        self.compressed.addmm_(compressed.T, counted)
        self.cross.addmm_(dense.T, counted)
        if lost is not None and self.lost is not None:
            self.lost.addmm_(lost.float().T, counted)
        self.tokens += len(dense) if weights is None else float(weights.sum())

    def inputs(self) -> torch.Tensor:
        """C' `[n, n]` fp64."""
        return self.compressed.double() / self.tokens

    def targets(self, weight: torch.Tensor) -> torch.Tensor:
        """`E[t x'ᵀ]` `[m, n]` fp64, with W `[m, n₀]`."""
        total = weight @ self.cross.double()
        return (total if self.lost is None else total + self.lost.double()) / self.tokens


class Outcome(NamedTuple):
    """What became of one layer.

    Args:
        share: how far it moved towards the least-squares solution; None if its old factors stayed.
        gain: by how much the held-out loss fell, nats a token by the quadratic model (with F).
    """

    share: float | None = None
    gain: float = 0.0


def refit_layer(
    dense: torch.Tensor,
    spec: LayerSpec,
    old: Tensors,
    fit: Moments,
    judge: Moments,
    outputs: torch.Tensor | None,
    teacher: torch.Tensor | None = None,
) -> tuple[Tensors, Outcome]:
    """The layer's new tensors if they lower the held-out loss, else the old ones.

    Args:
        dense: W `[m, n]` fp64.
        spec: kind and rank.
        old: `u [m, k]` and `v [k, n]`; of a layer that stays dense nothing, or `weight [m, n]` if it has lost features.
        fit: moments of the windows to fit to.
        judge: moments of the held-out windows.
        outputs: F `[m, m]`, or None for the identity.
        teacher: `[m, n₀]` fp64, whose outputs are to be repeated, where W is what is left of it; None: W's own.

    Returns:
        `u` and `v`, or the new `weight [m, n]` of a layer that stays dense, fp32 on the device of `dense`; empty
        if it stays as it was.

    Raises:
        RankwiseError: NaN or Inf in the compressed model's activations.
    """
    first = {part: tensor.to(dense.device) for part, tensor in old.items()}
    if not fit.tokens or not judge.tokens:
        return first, Outcome()
    teacher = dense if teacher is None else teacher
    inputs, target, c, t = fit.inputs(), fit.targets(teacher), judge.inputs(), judge.targets(teacher)
    if not all(torch.isfinite(m).all() for m in (inputs, target, c, t)):
        raise overflown()
    f = None if outputs is None else outputs.to(dense.device).double()
    step = _step(dense, inputs, target)
    share = best_share(dense, step, f, c, t)
    new = _truncated(dense + share * step, spec, inputs, outputs)
    before = loss(product(first).double() if first else dense, f, c, t)
    after = loss(product(new).double(), f, c, t)
    if before - after > ROUNDING * abs(before):
        return new, Outcome(share, before - after)
    return first, Outcome()


def product(tensors: Tensors, device: torch.device | None = None) -> torch.Tensor:
    """The matrix `[m, n]` that a layer's tensors stand for, in their dtype, where they are or on `device`."""
    if device is not None:
        tensors = {part: tensor.to(device) for part, tensor in tensors.items()}
    return tensors["weight"] if "weight" in tensors else tensors["u"] @ tensors["v"]


def loss(weight: torch.Tensor, f: torch.Tensor | None, c: torch.Tensor, t: torch.Tensor) -> float:
    """`½ E‖F^½ (t - Ŵ x')‖²` less the part that no Ŵ changes; nats a token with F.

    Args:
        weight: Ŵ `[m, n]`.
        f: F `[m, m]`, or None for the identity.
        c: `E[x' x'ᵀ]` `[n, n]`.
        t: `E[t x'ᵀ]` `[m, n]`.
    """
    inner = (weight @ c) @ weight.T - 2 * weight @ t.T
    return float(inner.trace() if f is None else (f * inner).sum()) / 2


def best_share(
    dense: torch.Tensor, step: torch.Tensor, f: torch.Tensor | None, c: torch.Tensor, t: torch.Tensor
) -> float:
    """The a in [0, 1] for which `W + a S` has the least `loss`, which is a parabola in a."""
    weighted = step if f is None else f @ step
    rise, curve = float((weighted * (t - dense @ c)).sum()), float((weighted * (step @ c)).sum())
    return min(1.0, max(0.0, rise / curve)) if curve > 0 else 0.0


def _step(dense: torch.Tensor, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`D (C' + ridge)⁻¹`."""
    ridge = RIDGE * inputs.diagonal().mean().clamp_min(1e-30) * torch.eye(len(inputs)).to(inputs)
    return torch.linalg.solve(inputs + ridge, (target - dense @ inputs).T).T


def _truncated(weight: torch.Tensor, spec: LayerSpec, inputs: torch.Tensor, outputs: torch.Tensor | None) -> Tensors:
    if spec.kind == "dense":
        return {"weight": weight.float()}
    found = factorize(weight, inputs, outputs)
    return {"u": found.u[:, : spec.rank].contiguous(), "v": found.v[: spec.rank].contiguous()}
