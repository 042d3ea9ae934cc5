"""4-bit rounding against definitions: slow references, exhaustive search, round-to-nearest, and the file's bytes."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.alloc import feedback, rounding
from rankwise.alloc.factors import factorize
from rankwise.alloc.feedback import DAMPING, round_both, round_columns, triangle
from rankwise.alloc.pivots import pivot_form
from rankwise.alloc.rounding import Rounded, _feedback, round_dense, round_lowrank, round_pivot, turned
from rankwise.alloc.scales import Grid, Scales, decoded, pack, search_scales
from rankwise.errors import RankwiseError
from rankwise.kernels.int4 import Int4, dequantize_int4, repack_int4
from rankwise.kernels.int8 import Int8
from rankwise.kernels.nf4 import LEVELS, NF4, repack_nf4
from rankwise.kernels.quantized import Stored, quantize

GRIDS = [Grid("int4", 32), Grid("int4", 32, False), Grid("int4", 64), Grid("nf4", 64), Grid("int8", None)]
ALL = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.name}-{g.group}-{'s' if g.symmetric else 'a'}")
TWO = pytest.mark.parametrize("two", [False, True], ids=["one-sided", "two-sided"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)), dtype=torch.float64)


def moment(size: int, seed: int = 1, spread: float = 1.0) -> torch.Tensor:
    """A correlated second moment, its directions a hundredfold apart in size, and not along the axes."""
    x = draw(4 * size, size, seed=seed) * torch.logspace(-spread, spread, size, dtype=torch.float64)
    turn = torch.linalg.qr(draw(size, size, seed=seed + 3)).Q
    return turn @ (x.T @ x) @ turn.T / len(x)


def lost(off: torch.Tensor, c: torch.Tensor, f: torch.Tensor | None) -> float:
    f = torch.eye(len(off), dtype=torch.float64) if f is None else f
    return float(torch.trace(f @ off @ c @ off.T)) / 2


def product(found: Rounded, index: torch.Tensor | None = None) -> torch.Tensor:
    t = {name: decoded(tensor) for name, tensor in found.tensors.items()}
    if "weight" in t:
        return t["weight"]
    if "u" in t:
        return t["u"] @ t["v"]
    assert index is not None
    return torch.cat([t["basis"], t["coeff"] @ t["basis"]])[index.long()]


def pivots(w: torch.Tensor, c: torch.Tensor, f: torch.Tensor | None, rank: int) -> tuple[torch.Tensor, ...]:
    found = factorize(w, c, f)
    return pivot_form(found.u[:, :rank], found.v[:rank])


# --- scales -----------------------------------------------------------------------------------------------------------


def spoken(w: torch.Tensor, scales: Scales, grid: Grid) -> torch.Tensor:
    """w rounded to the nearest numbers that these scales can say, written without `Grid.levels`."""
    table = torch.tensor({"nf4": LEVELS, "int4": range(16), "int8": range(-127, 128)}[grid.name], dtype=torch.float64)
    groups = w.unflatten(1, (-1, grid.width(w.shape[1])))[..., None]
    zero = scales.zero[:, :, None, None] if grid.name == "int4" else 0.0
    numbers = ((table - zero) * scales.scale[:, :, None, None]).expand(*groups.shape[:-1], len(table))
    return numbers.gather(-1, (groups - numbers).abs().argmin(-1, keepdim=True))[..., 0].flatten(1)


@ALL
def test_scales_beat_round_to_nearest_in_every_group(grid: Grid) -> None:
    w, weights = draw(6, 128) ** 3, torch.rand(128, generator=torch.Generator().manual_seed(1)).double()

    def error(rounded: torch.Tensor) -> torch.Tensor:
        return ((w - rounded).square() * weights).unflatten(1, (-1, grid.width(128))).sum(2)

    plain, found = error(decoded(grid.nearest(w))), error(spoken(w, search_scales(w, weights, grid), grid))
    assert (found <= plain * 1.0001).all()  # the kernels' functions compute in fp32
    assert found.sum() < 0.97 * plain.sum()


@ALL
def test_scales_are_nearly_the_best_there_are(grid: Grid) -> None:
    """Against hundreds of scales for each group, of both signs, with every zero point."""
    w, weights = draw(4, 64, seed=2), torch.linspace(0.1, 3, 64, dtype=torch.float64)
    zeros = range(16) if grid.name == "int4" and not grid.symmetric else [8]
    best = torch.full((4, 64 // grid.width(64)), torch.inf).double()
    for share in torch.linspace(0.02, 0.4, 120 if len(zeros) > 1 else 600):
        for sign, zero in itertools.product((1, -1) if grid.name == "int4" and len(zeros) == 1 else (1,), zeros):
            top = w.unflatten(1, (-1, grid.width(64))).abs().amax(2) * {"nf4": 8, "int4": 1, "int8": 8 / 127}[grid.name]
            scale = Scales(grid.stored(sign * share * top), torch.full_like(top, zero))
            error = ((w - spoken(w, scale, grid)).square() * weights).unflatten(1, (-1, grid.width(64))).sum(2)
            best = torch.minimum(best, error)
    found = ((w - spoken(w, search_scales(w, weights, grid), grid)).square() * weights).unflatten(
        1, (-1, grid.width(64))
    )
    assert found.sum() < 1.05 * best.sum()


@ALL
def test_identity_moments_leave_the_search_of_scales_alone(grid: Grid) -> None:
    w, eye = draw(8, 128), torch.eye(128).double()
    found = round_dense(w, grid, eye)
    scales = search_scales(w, torch.ones(128, dtype=torch.float64), grid)
    torch.testing.assert_close(product(found), spoken(w, scales, grid), rtol=1e-6, atol=1e-7)
    again = round_dense(w, grid, eye, torch.eye(8).double())
    torch.testing.assert_close(product(again), product(found))


@ALL
def test_bytes_are_what_the_levels_say(grid: Grid) -> None:
    w = draw(5, 128)
    scales = search_scales(w, torch.ones(128, dtype=torch.float64), grid)
    scale, zero = (t.repeat_interleave(grid.width(128), 1) for t in scales)
    levels = grid.levels(w / scale, zero)
    torch.testing.assert_close(decoded(pack(levels, scales, grid)), levels * scale, rtol=1e-6, atol=1e-8)


# --- error feedback ---------------------------------------------------------------------------------------------------


def halves(moment: torch.Tensor) -> torch.Tensor:
    """The damped moment."""
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment)).double()


@ALL
def test_columns_are_rounded_as_the_paper_says(grid: Grid) -> None:
    """GPTQ as written: after each column the others move by its error times a row of the inverse of what is left."""
    w, c = draw(6, 128), moment(128)
    tri = triangle(c)
    scales = search_scales(w, tri.weights, grid)
    scale, zero = (t.repeat_interleave(grid.width(128), 1) for t in scales)
    left, said = w.clone(), torch.zeros_like(w)
    todo = halves(c).diagonal().argsort(descending=True).tolist()
    while todo:
        inverse, j = torch.linalg.inv(halves(c)[todo][:, todo]), todo[0]
        said[:, j] = grid.levels(left[:, j] / scale[:, j], zero[:, j])
        error = (left[:, j] - said[:, j] * scale[:, j]) / inverse[0, 0]
        left[:, todo] -= error[:, None] * inverse[0]
        todo = todo[1:]
    assert torch.equal(round_columns(w, tri, scales, grid), said)


@ALL
@pytest.mark.parametrize("tile", [128, 24, 7])
def test_both_sides_are_rounded_as_defined(grid: Grid, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry at a time, each so that its own `(N Δ Mᵀ)_ij` is least, from the definition."""
    monkeypatch.setattr(feedback, "TILE", tile)
    w, c, f = draw(10, 64), moment(64), moment(10, 5)
    inputs, outputs = triangle(c), triangle(f)
    scales = search_scales(w, inputs.weights, grid)
    pick = torch.meshgrid(outputs.order, inputs.order, indexing="ij")
    turned, scale, zero = (t[pick] for t in (w, *(t.repeat_interleave(grid.width(128), 1) for t in scales)))
    levels, off = torch.zeros_like(w), torch.zeros_like(w)
    for i, j in itertools.product(range(10), range(64)):
        wanted = turned[i, j] + outputs.unit[i] @ off @ inputs.unit[j]  # Δ is still 0 from here on
        levels[i, j] = grid.levels(wanted / scale[i, j], zero[i, j])
        off[i, j] = turned[i, j] - levels[i, j] * scale[i, j]
    assert torch.equal(round_both(w, inputs, outputs, scales, grid)[pick], levels)


@TWO
def test_factors_of_a_moment_are_what_they_say(two: bool) -> None:
    c = moment(20) if two else moment(20)[:, :1] @ moment(20)[:1]  # of rank one
    order, unit, weights = triangle(c)
    whole = unit.T @ torch.diag(weights[order]) @ unit
    torch.testing.assert_close(whole, ((halves(c) + halves(c).T) / 2)[order][:, order])
    torch.testing.assert_close(unit, unit.tril())
    assert (unit.diagonal() == 1).all()


@TWO
def test_close_to_the_best_of_all_codes(two: bool) -> None:
    """Two live columns of two rows: all 16⁴ codes with the same scales. On average within a quarter of the best."""
    ratios, plain, grid = [], [], Grid("int4", 32)
    for seed in range(8):
        w, c = draw(2, 32, seed=seed), torch.zeros(32, 32, dtype=torch.float64)
        x = draw(9, 2, seed=seed) @ torch.tensor([[1.0, 0.8], [0.0, 0.5]]).double()
        c[3:5, 3:5] = x.T @ x / 9
        y = draw(9, 2, seed=seed + 50) @ torch.tensor([[1.0, 0.7], [0.0, 0.6]]).double()
        f = y.T @ y / 9 if two else torch.eye(2).double()
        found = round_dense(w, grid, c, f if two else None)
        [tensor] = found.tensors.values()
        codes = torch.cartesian_prod(*[torch.arange(-8.0, 8.0)] * 4).double().view(-1, 2, 2)
        off = w[:, 3:5] - codes * tensor.scale.double()[:, :, None].view(2, 1)
        every = torch.einsum("rs,bsi,ij,brj->b", f, off, c[3:5, 3:5], off) / 2
        assert found.loss >= float(every.min()) * (1 - 1e-9)
        ratios.append(found.loss / float(every.min()))
        plain.append(lost(w - decoded(grid.nearest(w)), c, f) / float(every.min()))
    gain = torch.tensor(plain).log().mean() - torch.tensor(ratios).log().mean()
    assert torch.tensor(ratios).log().mean().exp() < 1.6
    assert gain > 1.0


# --- whole layers -----------------------------------------------------------------------------------------------------


def rounded(
    kind: str, w: Any, c: Any, f: Any, grid: Grid, held_out: Any = None, rank: int = 64
) -> tuple[Rounded, float, torch.Tensor]:
    """What was found, the loss of round-to-nearest of the same tensors, and the product that was found."""
    if kind == "dense":
        found = round_dense(w, grid, c, f, held_out)
        return found, lost(w - decoded(grid.nearest(w)), c, f), product(found)
    if kind == "lowrank":
        factors = factorize(w, c, f)
        u, v = factors.u[:, :rank], factors.v[:rank]
        found, plain = round_lowrank(w, u, v, grid, c, f, held_out), (grid.nearest(u), grid.nearest(v))
        return found, lost(w - decoded(plain[0]) @ decoded(plain[1]), c, f), product(found)
    index, basis, coeff = pivots(w, c, f, rank)
    found = round_pivot(w, index, basis, coeff, grid, c, f, held_out)
    plain_one = Rounded({"basis": grid.nearest(basis), "coeff": grid.nearest(coeff)}, 0)
    return found, lost(w - product(plain_one, index), c, f), product(found, index)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["dense", "lowrank", "pivot"]),
    grid=st.sampled_from(GRIDS),
    seed=st.integers(0, 10**6),
    two=st.booleans(),
    spread=st.floats(0, 2),
    rows=st.integers(65, 90),
)
def test_never_worse_than_round_to_nearest(
    kind: str, grid: Grid, seed: int, two: bool, spread: float, rows: int
) -> None:
    w, c = draw(rows, 128, seed=seed), moment(128, seed, spread)
    f = moment(rows, seed + 1, spread) if two else None
    found, plain, result = rounded(kind, w, c, f, grid)
    assert found.loss <= plain * (1 + 1e-9)
    assert found.loss == pytest.approx(lost(w - result, c, f), rel=1e-6)


@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
def test_round_to_nearest_stays_where_feedback_loses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales four times as wide as they should be make feedback lose for certain."""

    def wide(w: torch.Tensor, weights: torch.Tensor, grid: Grid) -> Scales:
        found = search_scales(w, weights, grid)
        return Scales(found.scale * 4, found.zero)

    monkeypatch.setattr(rounding, "search_scales", wide)
    found, plain, _ = rounded(kind, draw(90, 128), torch.eye(128).double(), None, Grid("int4", 32))
    assert found.loss == pytest.approx(plain)


@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
def test_what_a_few_tokens_taught_stays_only_if_other_text_agrees(kind: str) -> None:
    w, few, other = draw(90, 128), draw(12, 128, seed=3), moment(128, 4, 0.0)
    c, grid = few.T @ few / 12, Grid("int4", 32)
    blind, _, taken = rounded(kind, w, c, None, grid)
    found, _, kept = rounded(kind, w, c, None, grid, other)
    assert lost(w - kept, other, None) < 0.9 * lost(w - taken, other, None)
    assert found.loss == pytest.approx(lost(w - kept, c, None), rel=1e-6)  # the metric of the prediction stays
    assert found.loss > blind.loss
    agreed, _, same = rounded(kind, w, c, None, grid, c)
    assert torch.equal(same, taken)
    assert agreed.loss == blind.loss


def test_a_factor_that_was_solved_again_goes_back_only_if_other_text_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rounding to nearest out of the race."""
    w, few, grid = draw(90, 128), draw(12, 128, seed=3), Grid("int4", 32)
    c, other = few.T @ few / 12, moment(128, 4, 0.0)
    monkeypatch.setattr(Grid, "nearest", lambda grid, one: quantize(100 * one.contiguous(), "int4", 32, True))
    factors = factorize(w, other)
    pair = factors.u[:, :64], factors.v[:64]
    blind, found = round_lowrank(w, *pair, grid, c), round_lowrank(w, *pair, grid, c, None, other)
    assert lost(w - product(found), other, None) < 0.98 * lost(w - product(blind), other, None)


@ALL
@pytest.mark.parametrize(("kind", "share"), [("dense", 0.5), ("lowrank", 0.5), ("pivot", 0.5)])
def test_much_better_where_channels_are_correlated(kind: str, share: float, grid: Grid) -> None:
    w = draw(128, 128)
    if kind != "dense":  # of a rank that is kept, so that all of the loss comes from rounding
        w = w[:, :64] @ draw(64, 128, seed=9) / 8
    one, plain, _ = rounded(kind, w, moment(128), None, grid)
    assert one.loss < share * plain
    c, f = moment(128), moment(128, 5)
    both, plain, _ = rounded(kind, w, c, f, grid)
    blind = rounded(kind, w, c, None, grid)[2]
    assert both.loss < share * plain
    assert both.loss < 0.9 * lost(w - blind, c, f)  # knowing F helps


@ALL
def test_exact_for_weights_on_the_grid(grid: Grid) -> None:
    w = decoded(grid.nearest(draw(16, 128)))
    found = round_dense(w, grid, moment(128), moment(16, 5))
    torch.testing.assert_close(product(found), w, rtol=1e-6, atol=1e-8)
    assert found.loss < 1e-9


@TWO
@ALL
def test_dead_channels(grid: Grid, two: bool) -> None:
    w, c = draw(70, 128), moment(128)
    c[:, 5:40] = c[5:40] = 0
    f = moment(70, 5) if two else None
    if f is not None:
        f[:, 60:] = f[60:] = 0
    for kind in ("dense", "lowrank", "pivot"):
        found, plain, result = rounded(kind, w, c, f, grid)
        assert torch.isfinite(result).all()
        assert found.loss <= plain
    kept = product(round_dense(w, grid, c, f))[:, 5:40]
    assert (kept - w[:, 5:40]).norm() < 0.3 * w[:, 5:40].norm()  # unseen ones are rounded, not thrown away


@TWO
def test_moments_or_weights_of_zeros(two: bool) -> None:
    grid, none = Grid("int4", 32), torch.zeros(128, 128, dtype=torch.float64)
    w = draw(70, 128)
    found = round_dense(w, grid, none, none[:70, :70] if two else None)
    assert found.loss == 0
    assert (product(found) - w).norm() < 0.2 * w.norm()
    empty = round_dense(torch.zeros(70, 128), grid, moment(128), moment(70, 5) if two else None)
    assert empty.loss == 0
    assert not product(empty).any()
    flat = round_lowrank(torch.zeros(70, 128), torch.zeros(70, 32), torch.zeros(32, 128), grid, moment(128))
    assert flat.loss == 0


@ALL
def test_files_formats_are_kept(grid: Grid) -> None:
    w = draw(70, 128).float()
    for kind in ("dense", "lowrank", "pivot"):
        found, _, _ = rounded(kind, w, moment(128), None, grid)
        for tensor in found.tensors.values():
            check_format(tensor, grid)


def check_format(tensor: Stored, grid: Grid) -> None:
    m, half = tensor.codes.shape
    if isinstance(tensor, Int8):
        assert (tensor.codes.dtype, tensor.scale.dtype) == (torch.int8, torch.bfloat16)
        assert tensor.scale.shape == (m, 1)
        assert (tensor.scale >= 0).all()
        assert int(tensor.codes.min()) >= -127
        return
    assert tensor.codes.dtype == torch.uint8
    if isinstance(tensor, NF4):
        assert tensor.absmax.dtype == torch.float32
        assert (tensor.absmax >= 0).all()  # bitsandbytes knows no others
        repack_nf4(tensor)
        return
    assert isinstance(tensor, Int4)
    assert grid.group is not None
    assert tensor.scale.dtype == torch.bfloat16
    assert tensor.scale.shape == (m, 2 * half // grid.group)
    assert (tensor.zero is None) == grid.symmetric
    assert tensor.zero is None or int(tensor.zero.max()) < 16
    torch.testing.assert_close(dequantize_int4(repack_int4(tensor)), dequantize_int4(tensor))


def test_nf4_bytes_read_as_bitsandbytes_reads_them() -> None:
    """Flat bytes, the first number in the high nibble, blocks of 64 in a row."""
    found = round_dense(draw(6, 128), Grid("nf4"), moment(128), moment(6, 5))
    tensor = found.tensors["weight"]
    assert isinstance(tensor, NF4)
    numbers = []
    for place, byte in enumerate(tensor.codes.flatten().tolist()):
        absmax = float(tensor.absmax.flatten()[2 * place // 64])
        numbers += [LEVELS[byte >> 4] * absmax, LEVELS[byte & 15] * absmax]
    torch.testing.assert_close(torch.tensor(numbers).view(6, 128).double(), product(found), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
def test_same_bytes_every_time(kind: str) -> None:
    w, c, f = draw(70, 128), moment(128), moment(70, 5)
    torch.manual_seed(1)
    first, _, _ = rounded(kind, w, c, f, GRIDS[0])
    torch.manual_seed(2)
    second, _, _ = rounded(kind, w, c, f, GRIDS[0])
    assert first.loss == second.loss
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.codes, second.tensors[name].codes)
        assert torch.equal(tensor[1], second.tensors[name][1])


def test_arguments_stay_as_they_were() -> None:
    w, c, f = draw(70, 128), moment(128), moment(70, 5)
    factors = factorize(w, c, f)
    given_ = [w, factors.u[:, :32].contiguous(), factors.v[:32].contiguous(), c, f]
    copies = [t.clone() for t in given_]
    round_lowrank(*given_[:3], Grid("int4", 32), *given_[3:])
    assert all(torch.equal(a, b) for a, b in zip(given_, copies, strict=True))


def test_turned_factors_have_the_same_product_and_even_columns() -> None:
    w = draw(90, 90) @ torch.logspace(0, -3, 90).double().diag() @ draw(90, 128)
    factors = factorize(w, moment(128), moment(90, 5))
    u, v = factors.u[:, :64].double(), factors.v[:64].double()
    turned_u, turned_v = turned(u, v)
    torch.testing.assert_close(turned_u @ turned_v, u @ v)
    spread = [float(t.norm(dim=0).max() / t.norm(dim=0).min()) for t in (u, turned_u)]
    assert spread[1] < 0.5 * spread[0]


def test_u_is_solved_again_for_the_v_that_is_there() -> None:
    """Against U of the truncated weight, rounded in the same metrics."""
    w, c, f, grid = draw(90, 128), moment(128), moment(90, 5), Grid("int4", 64)
    factors = factorize(w, c, f)
    u, v = factors.u[:, :64].double(), factors.v[:64].double()
    found, (turned_u, turned_v) = round_lowrank(w, u, v, grid, c, f), turned(u, v)
    v_hat = decoded(found.tensors["v"])
    old = decoded(_feedback(turned_u, grid, v_hat @ c @ v_hat.T, f))
    assert found.loss < 0.8 * lost(w - old @ v_hat, c, f)
    blind = decoded(_feedback(turned_v, grid, c, None))  # does not know what V's rows are worth
    assert lost(w - turned_u @ v_hat, c, f) < 0.6 * lost(w - turned_u @ blind, c, f)


@TWO
def test_coefficients_are_solved_again_for_the_basis_that_is_there(two: bool) -> None:
    """Against those of the truncated weight; with F also against those that do not look at the basis rows' errors."""
    w, c, f, grid = draw(90, 128), moment(128), moment(90, 5) if two else None, Grid("int4", 64)
    index, basis, coeff = pivots(w, c, f, 64)
    found, order = round_pivot(w, index, basis, coeff, grid, c, f), torch.argsort(index.long())
    b_hat, rest = decoded(found.tensors["basis"]), None if f is None else f[order[64:]][:, order[64:]]
    inner = b_hat @ c @ b_hat.T
    alone = torch.linalg.solve(inner, b_hat @ c @ w[order[64:]].T).T
    for one, share in ((coeff.double(), 0.92), (alone, 0.92 if two else 1.001)):
        other = Rounded({"basis": found.tensors["basis"], "coeff": _feedback(one, grid, inner, rest)}, 0)
        assert found.loss < share * lost(w - product(other, index), c, f)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", range(5))
def test_what_is_not_finite_is_refused(bad: float, place: int) -> None:
    tensors = [draw(70, 128), draw(70, 32), draw(32, 128), moment(128), moment(70, 5)]
    tensors[place][3, 3] = bad
    w, u, v, c, f = tensors
    with pytest.raises(RankwiseError, match="NaN or Inf"):
        round_lowrank(w, u, v, Grid("int4", 32), c, f)
    if place in (0, 3, 4):
        with pytest.raises(RankwiseError, match="NaN or Inf"):
            round_dense(w, Grid("int4", 32), c, f)
    else:
        index = torch.arange(70, dtype=torch.int32)
        with pytest.raises(RankwiseError, match="NaN or Inf"):
            round_pivot(w, index, v, u[:38], Grid("int4", 32), c, f)


def test_sizes_that_do_not_fit_are_refused() -> None:
    w, c, grid = draw(70, 128), moment(128), Grid("int4", 32)
    with pytest.raises(RankwiseError, match="input moments"):
        round_dense(w, grid, moment(64))
    with pytest.raises(RankwiseError, match="output-gradient moments"):
        round_dense(w, grid, c, moment(71))
    with pytest.raises(RankwiseError, match="held-out input moments"):
        round_dense(w, grid, c, None, moment(64))
    with pytest.raises(RankwiseError, match="divides the 100 columns"):
        round_dense(w[:, :100], grid, c[:100, :100])
    with pytest.raises(RankwiseError, match="divides the 33 columns"):
        round_lowrank(w, draw(70, 33), draw(33, 128), grid, c)
    with pytest.raises(RankwiseError, match="factors of a weight"):
        round_lowrank(w, draw(70, 32), draw(64, 128), grid, c)
    with pytest.raises(RankwiseError, match="those of a weight"):
        round_pivot(w, torch.arange(70), draw(32, 128), draw(32, 32), grid, c)
    with pytest.raises(RankwiseError, match="a matrix"):
        round_dense(w[0], grid, c)


def test_indefinite_moments_are_refused() -> None:
    turned = torch.eye(128).double()
    turned[0, 0] = -50
    with pytest.raises(RankwiseError, match="indefinite"):
        round_dense(draw(4, 128), Grid("int4", 32), turned)
    with pytest.raises(RankwiseError, match="indefinite"):
        round_dense(draw(4, 128), Grid("int4", 32), -torch.eye(128))


@pytest.mark.parametrize(("name", "group"), [("int3", 64), ("int4", 48), ("nf4", 32)])
def test_formats_that_no_kernel_has_are_refused(name: str, group: int) -> None:
    with pytest.raises(RankwiseError):
        Grid(name, group)
