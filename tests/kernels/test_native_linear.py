"""Groups of layers by `native_linear.c` are as exact as bf16 allows, for any shape; compiled for any processor."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE, draw, relative_error

from rankwise.kernels import Int8, native, quantize_int4, quantize_int8, quantize_nf4
from rankwise.kernels.backend import backend
from rankwise.kernels.fragments import Fragments
from rankwise.kernels.native_linear import HostGroup, Layer, host_group, suits
from rankwise.kernels.native_memory import PIECE, placed
from rankwise.kernels.native_panels import Matrix, panels_of, rows_of, take_rows
from rankwise.kernels.quantized import Quantized, dequantize

LIBRARY = native.library()
BF16 = torch.bfloat16
CODED = bool(LIBRARY is not None and LIBRARY.has_four_bits())
FORMATS = ["bf16", *(["int4", "asymmetric", "nf4", "int8"] if CODED else [])]
pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason="no gcc here"),
    pytest.mark.skipif(DEVICE != "cpu", reason="tensors of these tests are on a GPU"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library without what only this processor has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            native, "FLAGS", ["-O1", *(flag for flag in native.FLAGS if not flag.startswith(("-march", "-O")))]
        )
        return native.load(native.build("gcc", tmp_path_factory.mktemp("plain")))


@pytest.fixture(params=["native", "plain"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        other = request.getfixturevalue("plain")
        monkeypatch.setattr(native, "library", lambda: other)


def matrix(m: int, n: int, stored: str, seed: int) -> tuple[Matrix, torch.Tensor]:
    """Stored in a format, and what it stands for in fp64."""
    w = draw(m, n, dtype=torch.float32, seed=seed) / n**0.5
    if stored == "bf16":
        return w.to(BF16), w.to(BF16).double()
    how: dict[str, Callable[[], Quantized]] = {"nf4": lambda: quantize_nf4(w), "int8": lambda: quantize_int8(w)}
    coded = how.get(stored, lambda: quantize_int4(w + 0.02, 32, stored == "int4"))()
    assert not isinstance(coded, Fragments)
    return coded, dequantize(coded).double()


def layer(kind: str, m: int, n: int, rank: int, stored: str = "bf16", bias: bool = True) -> tuple[Layer, torch.Tensor]:
    """A layer, and the matrix `[m, n]` that it stands for."""
    b = draw(m, dtype=BF16, seed=9) if bias else None
    if kind == "dense":
        w, exact = matrix(m, n, stored, 1)
        return Layer(w, None, None, b, m), exact
    v, exact_v = matrix(rank, n, stored, 2)
    rest = m - rank if kind == "pivot" else m
    empty = torch.zeros(0, rank, dtype=BF16)
    u, exact_u = matrix(rest, rank, stored, 3) if rest else (empty, empty.double())
    if kind == "lowrank":
        return Layer(v, u, None, b, m), exact_u @ exact_v
    index = torch.randperm(m, generator=torch.Generator().manual_seed(m)).to(torch.int32)
    return Layer(v, u, index, b, m), torch.cat([exact_v, exact_u @ exact_v])[index.long()]


def exact_of(x: torch.Tensor, made: list[tuple[Layer, torch.Tensor]]) -> torch.Tensor:
    parts = [x.double() @ w.T + (0 if each.bias is None else each.bias.double()) for each, w in made]
    return torch.cat(parts, dim=-1)


def run(group: HostGroup, x: torch.Tensor, threads: int = 2) -> torch.Tensor:
    """By the function, whatever the size says about threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "ALONE", 0)
            patch.setattr(HostGroup, "reference", None)  # a test that compares PyTorch with itself shows nothing
            return group(x)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["dense", "lowrank", "pivot"]), min_size=1, max_size=3),
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=3, max_size=3),
    n=st.integers(1, 90),
    tokens=st.integers(1, 40),
    bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_shape(
    kinds: list[str], sizes: list[tuple[int, int]], n: int, tokens: int, bias: bool, threads: int
) -> None:
    made = [layer(kind, m, n, min(rank, m), bias=bias) for kind, (m, rank) in zip(kinds, sizes, strict=False)]
    x = draw(tokens, n, dtype=BF16)
    wanted = exact_of(x, made)
    y = run(host_group([each for each, _ in made]), x, threads)
    assert y.shape == wanted.shape
    assert relative_error(y, wanted) < 6e-3


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 9, 16, 17, 50])
def test_every_format(stored: str, tokens: int) -> None:
    shapes = [("dense", 40, 0), ("lowrank", 33, 64), ("pivot", 100, 64), ("pivot", 64, 64)]
    if stored != "bf16":  # and a mixture
        shapes = shapes[:3]
    made = [layer(kind, m, 128, rank, stored) for kind, m, rank in shapes] + [layer("lowrank", 20, 128, 8)]
    x = draw(tokens, 128, dtype=BF16)
    y = run(host_group([each for each, _ in made]), x)
    for found, wanted in zip(y.split([each.outputs for each, _ in made], -1), made, strict=True):
        assert relative_error(found, exact_of(x, [wanted])) < 6e-3


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 30])
def test_any_processor(tokens: int) -> None:
    made = [layer("dense", 70, 100, 0), layer("pivot", 90, 100, 24), layer("lowrank", 50, 100, 17)]
    x = draw(tokens, 100, dtype=BF16)
    assert relative_error(run(host_group([each for each, _ in made]), x), exact_of(x, made)) < 6e-3


@pytest.mark.skipif(not CODED, reason="no vectors of 512 bits here")
@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 90), n=st.integers(1, 90), rank=st.integers(1, 40), tokens=st.integers(1, 40))
def test_int8_of_any_shape(m: int, n: int, rank: int, tokens: int) -> None:
    made = [layer("dense", m, n, 0, "int8"), layer("pivot", m, n, min(rank, m), "int8" if rank < m else "bf16")]
    made.append(layer("lowrank", m, n, rank, "int8"))
    x = draw(tokens, n, dtype=BF16)
    assert relative_error(run(host_group([each for each, _ in made]), x), exact_of(x, made)) < 6e-3


def test_every_code_of_int8() -> None:
    """Also -128, which no rounding of ours makes."""
    codes = torch.arange(-128, 128).view(32, 8).to(torch.int8)
    for w in (Int8(codes, torch.full((32, 1), 0.5).bfloat16()), Int8(codes[1:-1], torch.rand(30, 1).bfloat16())):
        exact = dequantize(w).bfloat16()
        assert torch.equal(rows_of(panels_of(w)), exact)
        if CODED:
            x = torch.eye(8, dtype=BF16)
            assert torch.equal(run(host_group([Layer(w, None, None, None, len(exact))]), x), exact.T)


def test_codes_that_cannot_be_looked_up(plain: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    coded = layer("dense", 16, 64, 0, "nf4")[0]
    assert suits([coded], BF16) == CODED
    monkeypatch.setattr(native, "library", lambda: plain)
    assert not suits([coded], BF16)
    assert suits([layer("dense", 16, 64, 0)[0]], BF16)


@pytest.mark.parametrize("stored", FORMATS)
def test_a_token_is_alike_alone_and_in_any_batch(stored: str) -> None:
    group = host_group([layer("pivot", 200, 128, 64, stored)[0], layer("dense", 60, 128, 0, stored)[0]])
    x = draw(37, 128, dtype=BF16)
    together = run(group, x)
    for row in (0, 15, 16, 36):
        assert torch.equal(run(group, x[row : row + 1])[0], together[row])
    for count in (2, 3, 7, 11, 20):
        assert torch.equal(run(group, x[:count], threads=3), together[:count])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(bad: float) -> None:
    """And reaches what it would reach in PyTorch, though ranks and columns are filled up."""
    made = [layer("pivot", 45, 37, 5), layer("lowrank", 30, 37, 3), layer("dense", 9, 37, 0)]
    group = host_group([each for each, _ in made])
    x = draw(6, 37, dtype=BF16)
    y = x.clone()
    y[2, 36] = bad
    clean, found = run(group, x), run(group, y)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[others], clean[others])
    assert not found[2].isfinite().any()
    dense = found[2, -9:]
    assert torch.equal(dense.isnan(), torch.full((9,), bad != bad))


def test_inputs_of_any_layout() -> None:
    made = [layer("pivot", 45, 40, 8), layer("dense", 30, 40, 0)]
    group = host_group([each for each, _ in made])
    wide = draw(2, 3, 80, dtype=BF16)
    views = wide[..., :40], wide[..., 40:], wide[:, 1, :40], wide[0, 0, :40], wide[:1, :1, :40]
    for x in (*views, draw(40, 5, dtype=BF16).T):
        assert relative_error(run(group, x), exact_of(x, made)) < 6e-3
    assert run(group, wide[:0, :, :40]).shape == (0, 3, 75)
    expanded = draw(1, 40, dtype=BF16).expand(4, 40)
    assert torch.equal(run(group, expanded), run(group, expanded[:1]).expand(4, -1))
    for narrow in (wide[0, :, :39], wide[..., :39]):
        with pytest.raises(ValueError, match="39 features; the layers take 40"):
            group(narrow)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
def test_rows_can_be_had_back(kind: str, stored: str) -> None:
    """What runs where the function may not."""
    made = [layer(kind, 100, 128, 64, stored), layer("dense", 10, 128, 0)]
    group = host_group([each for each, _ in made])
    x = draw(2, 5, 128, dtype=BF16)
    with backend("torch"):
        assert relative_error(group(x), exact_of(x, made)) < 2e-2
        assert group(x[:0]).shape == (0, 5, 110)
    w, exact = matrix(50, 128, stored, 5)
    assert relative_error(rows_of(panels_of(w)), exact) < (4e-3 if stored == "nf4" else 2.1e-3)


def test_what_suits() -> None:
    dense = layer("dense", 16, 64, 0)[0]
    assert suits([dense], BF16)
    assert not suits([dense], torch.float32)
    assert not suits([Layer(draw(16, 64, dtype=torch.float32), None, None, None, 16)], torch.float32)
    with backend("torch"):
        assert not suits([dense], BF16)


def test_memory_goes_with_the_last_tensor() -> None:
    first = placed(draw(3, 5, dtype=BF16))
    second = placed(draw(PIECE // 4 + 16, dtype=torch.float32))  # more than is left
    third = placed(torch.arange(7))
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == third.data_ptr() % 64 == 0
    assert torch.equal(third, torch.arange(7))
    assert torch.equal(first, draw(3, 5, dtype=BF16))
    assert placed(torch.zeros(0, 3)).shape == (0, 3)


def test_threads_may_outnumber_panels() -> None:
    made = [layer("lowrank", 3, 64, 2)]
    group = host_group([each for each, _ in made])
    x = draw(2, 64, dtype=BF16)
    assert torch.equal(run(group, x, threads=1), run(group, x, threads=4))


@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (37, 21), (130, 64)])
def test_rows_by_their_numbers(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.arange(shape[0]).flip(0).repeat(2)
    assert torch.equal(take_rows(panels_of(weight), ids), weight[ids])
    assert take_rows(panels_of(weight), ids[:0]).shape == (0, shape[1])
    coded = quantize_int8(weight)
    assert torch.equal(take_rows(panels_of(coded), ids), dequantize(coded)[ids].bfloat16())
    assert take_rows(panels_of(coded), ids[:0]).shape == (0, shape[1])
