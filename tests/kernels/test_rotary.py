"""Rotary embedding equals complex products in fp64; keys and values land in their slots and nowhere else."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE, TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error

from rankwise.kernels.rotary import rotary, rotary_, rotary_to_cache_, write_cache_

# tokens, heads, kv_heads, head_dim, rotary_dim
SHAPES = {
    "gqa": (5, 9, 3, 64, 64),
    "no shared heads": (2, 2, 2, 80, 80),
    "many heads": (1, 20, 10, 16, 16),
    "partial": (3, 4, 2, 20, 8),
    "one pair": (3, 1, 1, 2, 2),
    "no token": (0, 2, 1, 16, 16),
}
BACKENDS = [
    *(pytest.param(dtype, None, id=f"torch-{dtype}".replace("torch.", "")) for dtype in TOLERANCE),
    *(pytest.param(d, "triton", id=f"triton-{d}".replace("torch.", ""), marks=needs_triton) for d in TRITON_DTYPES),
]
EITHER = [None, pytest.param("triton", marks=needs_triton)]


def running(backend: str | None) -> Any:
    return in_triton() if backend else nullcontext()


def tables(rotary_dim: int, dtype: torch.dtype = torch.float32, length: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    speeds = 10.0 ** -torch.arange(0, rotary_dim // 2, dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * speeds
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def places(count: int) -> torch.Tensor:
    return ints(*[(7 * i + 3) % 50 for i in range(count)])


def exact(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    x, half = x.double(), cos.shape[1]
    turn = torch.complex(cos.double(), sin.double())[positions.long()][:, None]
    z = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat((z.real, z.imag, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_equals_complex_products(dtype: torch.dtype, backend: str | None, shape: Any) -> None:
    tokens, heads, kv_heads, dim, rotary_dim = shape
    q, k = draw(tokens, heads, dim, dtype=dtype), draw(tokens, kv_heads, dim, dtype=dtype, seed=1)
    cos, sin = tables(rotary_dim, torch.float64 if dtype == torch.float64 else torch.float32)
    positions = places(tokens)
    before = q.clone(), k.clone()
    with running(backend):
        y = rotary(q, k, cos, sin, positions)
    for x, turned, copy in zip((q, k), y, before, strict=True):
        assert torch.equal(x, copy)
        assert turned.dtype == dtype
        assert relative_error(turned, exact(x, cos, sin, positions)) <= TOLERANCE[dtype]
        assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])
    with running(backend):
        rotary_(q, k, cos, sin, positions)
    assert torch.equal(q, y[0])
    assert torch.equal(k, y[1])


@pytest.mark.parametrize("backend", EITHER)
def test_in_place_in_a_packed_projection(backend: str | None) -> None:
    packed = draw(4, 8 * 16, dtype=torch.float32)
    before = packed.clone()
    q, k, v = packed.view(4, 8, 16).split((4, 2, 2), 1)
    cos, sin = tables(16)
    with running(backend):
        rotary_(q, k, cos, sin, places(4))
    expected = exact(before.view(4, 8, 16)[:, :6], cos, sin, places(4))
    assert relative_error(packed.view(4, 8, 16)[:, :6], expected) <= 1e-5
    assert torch.equal(v, before.view(4, 8, 16)[:, 6:])


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_keys_and_values_land_in_their_slots(dtype: torch.dtype, backend: str | None, partial: bool) -> None:
    q, k, v = draw(4, 8, 20, dtype=dtype).split((4, 2, 2), 1)
    cos, sin = tables(8 if partial else 20, torch.float64 if dtype == torch.float64 else torch.float32)
    caches = draw(2, 5, 3, 2, 20, dtype=dtype, seed=2)
    (k_cache, v_cache), slots, expected = caches.clone().unbind(), ints(14, -1, 0, 7), caches.clone()
    with running(backend):
        turned, keys = rotary(q, k, cos, sin, places(4))
        rotary_to_cache_(q, k, v, cos, sin, places(4), k_cache, v_cache, slots)
    for token, slot in ((0, 14), (2, 0), (3, 7)):
        written = k_cache.view(15, 2, 20)[slot]
        assert relative_error(written, keys[token]) <= TOLERANCE[dtype]
        expected[0].view(15, 2, 20)[slot] = written
        expected[1].view(15, 2, 20)[slot] = v[token]
    assert torch.equal(torch.stack((k_cache, v_cache)), expected)  # and nowhere else
    assert relative_error(q, turned) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", EITHER)
@pytest.mark.parametrize("dim", [16, 24])
def test_writes_without_turning(dim: int, backend: str | None) -> None:
    k, v = draw(3, 2, dim, dtype=torch.float32), draw(3, 2, dim, dtype=torch.float32, seed=1)
    caches = torch.zeros(4, 2, 5, 2, dim, device=DEVICE)  # keys and values of a block lie side by side
    k_cache, v_cache = caches.unbind(1)
    with running(backend):
        write_cache_(k, v, k_cache, v_cache, ints(19, -1, 5).long())
    expected = torch.zeros_like(caches)
    expected[3, 0, 4], expected[3, 1, 4], expected[1, 0, 0], expected[1, 1, 0] = k[0], v[0], k[2], v[2]
    assert torch.equal(caches, expected)


@pytest.mark.parametrize("backend", EITHER)
def test_padding_alone_writes_nothing(backend: str | None) -> None:
    k, cache = draw(3, 2, 16, dtype=torch.float32), torch.zeros(2, 4, 2, 16, device=DEVICE)
    with running(backend):
        write_cache_(k, k, cache, cache.clone(), ints(-1, -1, -1))
        write_cache_(k[:0], k[:0], cache, cache.clone(), ints())
    assert not cache.any()


@needs_triton
@settings(max_examples=8, deadline=None)
@given(heads=st.integers(1, 10), kv_heads=st.integers(1, 10), half=st.integers(1, 12), rest=st.integers(0, 9))
def test_triton_equals_torch_for_any_heads(heads: int, kv_heads: int, half: int, rest: int) -> None:
    q, k = draw(2, heads, 2 * half + rest), draw(2, kv_heads, 2 * half + rest, seed=1)
    q, k, (cos, sin) = q.float(), k.float(), tables(2 * half)
    plain = rotary(q, k, cos, sin, places(2))
    with in_triton():
        y = rotary(q, k, cos, sin, places(2))
    assert relative_error(y[0], plain[0]) <= 1e-6
    assert relative_error(y[1], plain[1]) <= 1e-6


@needs_triton
def test_the_operations_keep_their_promises_to_the_compiler() -> None:
    q, k, cache = draw(3, 2, 8).float(), draw(3, 1, 8).float(), torch.zeros(2, 4, 1, 8, device=DEVICE)
    turn, slots = (*tables(8), places(3)), ints(1, -1, 6)
    calls = {
        "rotary": (q, k, *turn),
        "rotary_": (q, k, *turn),
        "rotary_to_cache_": (q, k, k.clone(), *turn, cache, cache.clone(), slots),
        "write_cache_": (k, k.clone(), cache, cache.clone(), slots),
    }
    for name, arguments in calls.items():
        checks = ["test_schema", "test_faketensor"]
        torch.library.opcheck(getattr(torch.ops.rankwise, name), arguments, test_utils=checks)
