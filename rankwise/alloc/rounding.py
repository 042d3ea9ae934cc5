"""Weights and factors in 4 or 8 bits, rounded so that the output changes least: `½ tr(F ΔW C ΔWᵀ)`, ΔW = W - Ŵ.

A dense weight: scales are searched, then entries rounded with error feedback (`feedback.py`).
Factors U V: V first, in the metric of C and of `Uᵀ F U`, which says what its rows are worth. U is then solved again for
the V that will be there, `U = W C V̂ᵀ (V̂ C V̂ᵀ)⁻¹`, and rounded in the metric of `V̂ C V̂ᵀ` and F, as CALDERA
(2405.18886) does with one-sided metrics. `U R⁻¹` and `R V` are the same layer for any R: components are given equal
shares in both factors and then mixed by a random rotation, so that no column of U sets a scale which the others of its
group cannot use.
Pivot: basis and coefficients likewise; they leave no such freedom.
Two guards, in the metric of held-out inputs if their moments are given: error feedback is kept only where it does
better than round-to-nearest, and a factor that is worse for having been solved again competes with the one that was
there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from rankwise.alloc.factors import REMEASURE
from rankwise.alloc.feedback import round_both, round_columns, triangle
from rankwise.alloc.scales import Grid, decoded, pack, search_scales
from rankwise.errors import RankwiseError
from rankwise.kernels.quantized import Stored

RIDGE = 1e-6  # of the mean eigenvalue, added before a moment is inverted
SEED = 0  # of the rotation


class Rounded(NamedTuple):
    """One layer in 4 or 8 bits.

    Args:
        tensors: `weight`; or `u` and `v`; or `basis` and `coeff`.
        loss: `½ tr(F ΔW C ΔWᵀ)` against the dense weight: nats a token with F, by the second-order estimate.
    """

    tensors: dict[str, Stored]
    loss: float


@torch.no_grad()
def round_dense(
    weight: torch.Tensor,
    grid: Grid,
    inputs: torch.Tensor,
    outputs: torch.Tensor | None = None,
    held_out: torch.Tensor | None = None,
) -> Rounded:
    """Round a weight.

    Args:
        weight: W `[m, n]`, any float dtype, finite; `grid.group` divides n.
        grid: the format.
        inputs: C `[n, n]`, symmetric positive semi-definite up to rounding; may be singular or zero.
        outputs: F `[m, m]`, likewise, or None for the identity.
        held_out: C of other text, for the guards; None: `inputs` itself.

    Returns:
        `weight` on the device of `weight`.

    Raises:
        RankwiseError: NaN, Inf, a truly indefinite moment, or sizes that do not fit.
    """
    w, c, f, judge = _problem(weight, inputs, outputs, held_out)
    tries = [_feedback(w, grid, c, f), grid.nearest(w)]
    best = min(tries, key=lambda t: _loss(w - decoded(t), judge, f))
    return Rounded({"weight": best}, _loss(w - decoded(best), c, f))


@torch.no_grad()
def round_lowrank(
    weight: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    grid: Grid,
    inputs: torch.Tensor,
    outputs: torch.Tensor | None = None,
    held_out: torch.Tensor | None = None,
) -> Rounded:
    """Round factors of a weight.

    Args:
        weight: the dense W `[m, n]`.
        u: `[m, k]`; `grid.group` divides k.
        v: `[k, n]`; `grid.group` divides n.
        grid: of both.
        inputs: see `round_dense`.
        outputs: see `round_dense`.
        held_out: see `round_dense`.

    Returns:
        `u` and `v`, of other factors of about the same product (see above); the loss includes what the rank has cost.

    Raises:
        RankwiseError: see `round_dense`.
    """
    w, c, f, judge = _problem(weight, inputs, outputs, held_out)
    given = _factors(w, u, v)
    turned_u, turned_v = turned(*given)
    first = _feedback(turned_v, grid, c, turned_u.T @ _applied(f, turned_u))
    v_hat = decoded(first)
    inner = v_hat @ c @ v_hat.T
    refit = turned_u + _project(w - turned_u @ v_hat, c, v_hat, inner)
    solved = _contenders(refit, turned_u, lambda one: _loss(w - one @ v_hat, judge, f))
    tries = [(_feedback(one, grid, inner, f), first) for one in solved] + [tuple(map(grid.nearest, given))]
    a, b = min(tries, key=lambda pair: _loss(w - decoded(pair[0]) @ decoded(pair[1]), judge, f))
    return Rounded({"u": a, "v": b}, _loss(w - decoded(a) @ decoded(b), c, f))


@torch.no_grad()
def round_pivot(
    weight: torch.Tensor,
    index: torch.Tensor,
    basis: torch.Tensor,
    coeff: torch.Tensor,
    grid: Grid,
    inputs: torch.Tensor,
    outputs: torch.Tensor | None = None,
    held_out: torch.Tensor | None = None,
) -> Rounded:
    """Round a pivot layer, `Ŵ = Pᵀ [I; K] B`.

    Args:
        weight: the dense W `[m, n]`.
        index: `[m]`, see `kernels.pivot_linear`; stays as it is.
        basis: B `[k, n]`; `grid.group` divides n.
        coeff: K `[m - k, k]`; `grid.group` divides k.
        grid: of both.
        inputs: see `round_dense`.
        outputs: see `round_dense`.
        held_out: see `round_dense`.

    Returns:
        `basis` and `coeff`; the loss includes what the rank has cost.

    Raises:
        RankwiseError: see `round_dense`.
    """
    w, c, f, judge = _problem(weight, inputs, outputs, held_out)
    b, k = _finite(basis, "basis").to(w), _finite(coeff, "coeff").to(w)
    if (len(b) + len(k), len(b), w.shape[1]) != (len(w), k.shape[1], b.shape[1]):
        raise RankwiseError("basis and coeff", (tuple(b.shape), tuple(k.shape)), f"those of a weight {tuple(w.shape)}")
    order, rank = torch.argsort(index.to(w.device).long(), stable=True), len(b)
    w, f = w[order], None if f is None else f[order][:, order]
    rows = torch.cat([torch.eye(rank).to(k), k])
    first = _feedback(b, grid, c, rows.T @ _applied(f, rows))
    b_hat = decoded(first)

    def lost(coeff: torch.Tensor, basis: torch.Tensor, metric: torch.Tensor = judge) -> float:
        return _loss(w - torch.cat([basis, coeff @ basis]), metric, f)

    inner, missing = b_hat @ c @ b_hat.T, w[rank:] - k @ b_hat
    if f is not None:  # the other rows can make up for what the basis rows have lost
        outer = _ridged(f[rank:, rank:])
        missing = missing + torch.linalg.solve(outer, f[rank:, :rank] @ (w[:rank] - b_hat))
    refit = k + _project(missing, c, b_hat, inner)
    solved = _contenders(refit, k, lambda one: lost(one, b_hat))
    rest = None if f is None else f[rank:, rank:]
    tries = [(first, _feedback(one, grid, inner, rest)) for one in solved] + [(grid.nearest(b), grid.nearest(k))]
    x, y = min(tries, key=lambda pair: lost(decoded(pair[1]), decoded(pair[0])))
    return Rounded({"basis": x, "coeff": y}, lost(decoded(y), decoded(x), c))


def _feedback(w: torch.Tensor, grid: Grid, inputs: torch.Tensor, outputs: torch.Tensor | None) -> Stored:
    if w.shape[1] % grid.width(w.shape[1]):
        raise RankwiseError("group", grid.group, f"one that divides the {w.shape[1]} columns of each matrix")
    columns = triangle(inputs)
    scales = search_scales(w, columns.weights, grid)
    if outputs is None:
        return pack(round_columns(w, columns, scales, grid), scales, grid)
    return pack(round_both(w, columns, triangle(outputs), scales, grid), scales, grid)


def turned(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product, each component with the same norm in both factors, then all mixed by one random rotation."""
    scale = (v.norm(dim=1) / u.norm(dim=0)).sqrt()
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
    noise = torch.randn(len(v), len(v), generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    turn = torch.linalg.qr(noise).Q.to(u)
    return (u * scale) @ turn.T, turn @ (v / scale[:, None])


def _contenders(refit: torch.Tensor, given: torch.Tensor, lost: Callable[[torch.Tensor], float]) -> list[torch.Tensor]:
    """A factor that was solved again, and the given one too where that is better before it is rounded."""
    return [refit] if lost(refit) <= lost(given) else [refit, given]


def _project(missing: torch.Tensor, c: torch.Tensor, v: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """The A for which `A v` is nearest to `missing` in the metric of C; `inner` is `v C vᵀ`."""
    return torch.linalg.solve(_ridged(inner), v @ c @ missing.T).T


def _ridged(moment: torch.Tensor) -> torch.Tensor:
    ridge = (RIDGE * moment.diagonal().mean()).clamp_min(1e-30)
    return moment + ridge * torch.eye(len(moment)).to(moment)


def _applied(f: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    return rows if f is None else f @ rows


def _loss(off: torch.Tensor, c: torch.Tensor, f: torch.Tensor | None) -> float:
    return float((_applied(f, off @ c) * off).sum()) / 2


def _problem(
    weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor | None, held_out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """W, C, F and the guards' C in fp64 on the weight's device."""
    w = _finite(weight, "weight").double()
    if w.ndim != 2:
        raise RankwiseError("weight", tuple(w.shape), "a matrix")
    c = _moment(inputs, "input moments", w.shape[1], w)
    f = None if outputs is None else _moment(outputs, "output-gradient moments", w.shape[0], w)
    return w, c, f, c if held_out is None else _moment(held_out, "held-out input moments", w.shape[1], w)


def _moment(matrix: torch.Tensor, what: str, size: int, like: torch.Tensor) -> torch.Tensor:
    if tuple(matrix.shape) != (size, size):
        raise RankwiseError(what, tuple(matrix.shape), f"[{size}, {size}]")
    m = _finite(matrix, what).to(like)
    if float(m.diagonal().mean()) < 0:
        raise RankwiseError(what, "indefinite (mean of the diagonal below 0)", REMEASURE)
    return (m + m.T) / 2


def _factors(w: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if u.ndim != 2 or v.ndim != 2 or (len(u), u.shape[1], v.shape[1]) != (len(w), len(v), w.shape[1]):
        raise RankwiseError("u and v", (tuple(u.shape), tuple(v.shape)), f"factors of a weight {tuple(w.shape)}")
    return _finite(u, "u").to(w), _finite(v, "v").to(w)


def _finite(matrix: torch.Tensor, what: str) -> torch.Tensor:
    if not torch.isfinite(matrix).all():
        raise RankwiseError(what, "NaN or Inf", "finite numbers are needed")
    return matrix
