"""What gcc makes of `native.c` gives the results of PyTorch, whatever the layout; without gcc PyTorch does it all."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Pages, exact, paged
from tensors import DEVICE, TOLERANCE, draw, relative_error

from rankwise.kernels import native
from rankwise.kernels.attention import decode_attention
from rankwise.kernels.backend import backend
from rankwise.kernels.norm import add_rms_norm, rms_norm
from rankwise.kernels.rotary import rotary_to_cache_
from rankwise.kernels.swiglu import geglu, swiglu

DTYPES = [torch.bfloat16, torch.float32]
pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no gcc here"),
    pytest.mark.skipif(DEVICE != "cpu", reason="tensors of these tests are on a GPU"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that ran: a test that compares PyTorch with itself shows nothing."""
    seen: list[str] = []
    call = native.call

    def noting(name: str, *arguments: Any) -> int:
        seen.append(name)
        return call(name, *arguments)

    monkeypatch.setattr(native, "call", noting)
    return seen


@settings(max_examples=40, deadline=None)
@given(
    contexts=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    block=st.sampled_from([1, 3, 16]),
    group=st.integers(1, 8),
    dim=st.sampled_from([16, 48, 64, 128, 192]),
    window=st.one_of(st.none(), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
)
def test_decoding_is_exact(
    contexts: list[int], block: int, group: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    pages = paged(contexts, 2, dim, block, dtype)
    q = draw(len(contexts), 2 * group, dim, dtype=dtype)
    arguments = pages.k_cache, pages.v_cache, pages.table, pages.context_lens
    y = decode_attention(q, *arguments, window=window)
    for row, (x, k, v) in enumerate(zip(q, pages.keys, pages.values, strict=True)):
        if len(k):
            assert relative_error(y[row], exact(x[None], k, v, dim**-0.5, window)[0]) <= TOLERANCE[dtype]
        else:
            assert not y[row].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_is_alike_alone_and_in_any_batch(dtype: torch.dtype, calls: list[str]) -> None:
    pages = paged([70, 3, 33, 64], 2, 32, 8, dtype)
    q = draw(4, 6, 32, dtype=dtype)

    def decode(rows: slice) -> torch.Tensor:
        some = Pages([], [], pages.k_cache, pages.v_cache, pages.table[rows], pages.context_lens[rows])
        return decode_attention(q[rows], some.k_cache, some.v_cache, some.table, some.context_lens)

    together = decode(slice(None))
    for row in range(4):
        assert torch.equal(decode(slice(row, row + 1))[0], together[row])
    assert calls == ["attention"] * 5


def test_huge_and_equal_scores(calls: list[str]) -> None:
    pages = paged([40], 1, 16, 8, torch.float32)
    q = 1e4 * draw(1, 2, 16, dtype=torch.float32)
    arguments = pages.k_cache, pages.v_cache, pages.table, pages.context_lens
    chosen = (q[0].double() @ pages.keys[0][:, 0].T).argmax(-1)
    assert relative_error(decode_attention(q, *arguments)[0], pages.values[0][chosen, 0]) <= 1e-6
    mean = pages.values[0][:, 0].mean(0)
    assert relative_error(decode_attention(torch.zeros_like(q), *arguments)[0, 0], mean) <= 1e-6
    assert calls == ["attention"] * 2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 8), (3, 576), (70, 640), (5, 4, 24)], ids=str)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype, offset: bool, shape: tuple[int, ...], threads: int, calls: list[str]) -> None:
    wide = draw(*shape[:-1], 2 * shape[-1], dtype=dtype)
    x, residual = wide.chunk(2, -1)  # a view, as the queries of a packed projection are
    weight = draw(shape[-1], dtype=dtype, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = rms_norm(x, weight, 1e-5, offset), *add_rms_norm(x, residual, weight, 1e-5, offset)
    finally:
        torch.set_num_threads(before)
    assert calls == ["norm"] * 2
    total = x + residual
    for y, source in ((found[0], x), (found[1], total)):
        exact_ = source.double() * (source.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        assert y.is_contiguous()
        torch.testing.assert_close(
            y.double(), exact_ * (weight.double() + offset), rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
    assert torch.equal(found[2], total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_of_any_size(dtype: torch.dtype, calls: list[str]) -> None:
    ends = [-1e4, -200.0, -88.0, -20.0, 20.0, 88.0, 200.0, 1e4]
    gate = torch.cat((torch.tensor(ends), torch.linspace(-30, 30, 500))).to(dtype).expand(3, -1)
    up = draw(*gate.shape, dtype=dtype)
    y = swiglu(gate, up)
    assert calls == ["gated"]
    wide = gate.double()
    close = {"rtol": 2**-8 if dtype == torch.bfloat16 else 2e-6, "atol": 1e-12}
    torch.testing.assert_close(y.double(), wide * torch.sigmoid(wide) * up.double(), **close)
    exact_ = torch.nn.functional.gelu(wide, approximate="tanh") * up.double()
    close["atol"] = 1e-6 * float(up.abs().max())  # where tanh all but is -1
    torch.testing.assert_close(geglu(gate, up).double(), exact_, **close)
    assert calls == ["gated"] * 2


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_land_where_pytorch_puts_them(
    dtype: torch.dtype, tokens: int, partial: bool, calls: list[str]
) -> None:
    heads = draw(tokens, 8, 24, dtype=dtype)
    angles = draw(300, 4 if partial else 12, dtype=torch.float32)
    order = torch.randperm(16 * 13, generator=torch.Generator().manual_seed(0))[:tokens].to(torch.int32)
    order[1] = -1
    found = {}
    for choice in ("auto", "torch"):
        q, k, v = heads.clone().split((4, 2, 2), 1)
        cache = torch.full((2, 16, 13, 2, 24), 7, dtype=dtype)
        positions = torch.arange(7, 7 + tokens, dtype=torch.int32)
        with backend(choice):
            rotary_to_cache_(q, k, v, angles.cos(), angles.sin(), positions, *cache, order)
        found[choice] = q, cache
    assert calls == ["rotary"]
    for ours, theirs in zip(found["auto"], found["torch"], strict=True):
        close = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(ours, theirs, **close)
        assert torch.equal(ours == 7, theirs == 7)


def test_bf16_is_rounded_as_pytorch_rounds() -> None:
    """Ties to even, infinities and NaN: a sum with zero gives the numbers back, one with half a step rounds."""
    x = torch.tensor([1.0, 1.0078125, 3.3895e38, float("inf"), float("nan"), -0.0, 1e-40]).bfloat16().expand(1, -1)
    for other in (0.0, 0.00390625, 1e38, float("inf")):
        y = torch.full_like(x, other)
        total = add_rms_norm(x, y, torch.ones(7, dtype=torch.bfloat16))[1]
        torch.testing.assert_close(total, x + y, rtol=0, atol=0, equal_nan=True)


def test_gradients_and_other_dtypes_are_left_to_pytorch(calls: list[str]) -> None:
    x, weight = draw(2, 8, dtype=torch.float32).requires_grad_(), draw(8, dtype=torch.float32)
    rms_norm(x, weight).sum().backward()
    assert x.grad is not None
    for dtype in (torch.float16, torch.float64):
        rms_norm(draw(2, 8, dtype=dtype), draw(8, dtype=dtype))
    with backend("torch"):
        rms_norm(x.detach(), weight)
    rms_norm(x.detach(), weight.bfloat16())
    assert not calls
    rms_norm(x.detach(), weight)
    assert calls == ["norm"]


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it only matters that something is compiled."""
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-O0"])


@pytest.mark.usefixtures("quickly")
def test_it_is_compiled_once(tmp_path: Path) -> None:
    first = native.build("gcc", tmp_path)
    made = first.stat().st_mtime_ns
    assert native.build("gcc", tmp_path) == first
    assert first.stat().st_mtime_ns == made
    assert list(tmp_path.iterdir()) == [first]


@pytest.mark.usefixtures("quickly")
def test_many_at_once_get_a_whole_library(tmp_path: Path) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(native.build("gcc", tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 3


@pytest.mark.parametrize("trouble", ["no compiler", "broken compiler", "no folder"])
def test_without_it_pytorch_does_it(trouble: str, tmp_path: Path) -> None:
    """In a process of its own, quietly, and right."""
    path, cache = tmp_path / "bin", tmp_path / "cache"
    path.mkdir()
    if trouble == "broken compiler":
        (path / "gcc").write_text("#!/bin/sh\necho gcc 1; test $# = 1")
        (path / "gcc").chmod(0o755)
    if trouble == "no folder":
        cache.write_text("a file")
        (path / "gcc").symlink_to("/usr/bin/gcc")
    code = """
import torch
from rankwise.kernels import native
from rankwise.kernels.norm import rms_norm
x = torch.arange(8.0)[None]
assert native.library() is None
torch.testing.assert_close(rms_norm(x, torch.ones(8), 0.0), x / x.square().mean().sqrt())
"""
    environment = {"PATH": f"{path}:/bin" if trouble == "broken compiler" else str(path), "RANKWISE_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "native" not in done.stderr
