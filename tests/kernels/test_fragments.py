"""Packing loses nothing, whatever the shape: bytes of the file, words of the kernels, scales, and back."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE

from rankwise.errors import RankwiseError
from rankwise.kernels.fragments import from_tiles, from_words, join_nibbles, split_nibbles, to_tiles, to_words
from rankwise.kernels.int4 import GROUPS, dequantize_int4, quantize_int4, repack_int4, unpack_int4
from rankwise.kernels.nf4 import BLOCK, LEVELS, dequantize_nf4, quantize_nf4, repack_nf4, unpack_nf4

ROWS = st.integers(1, 50)
few = settings(max_examples=30, deadline=None)


def codes(m: int, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (m, n), generator=generator, dtype=torch.uint8).to(DEVICE)


def numbers(m: int, n: int, seed: int) -> torch.Tensor:
    """Of very different sizes; some are 0."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=generator) * torch.exp2(torch.randint(-20, 20, (m, 1), generator=generator))
    return (w * (torch.rand(m, n, generator=generator) > 0.1)).to(DEVICE)


@few
@given(ROWS, st.integers(0, 40), st.booleans(), st.integers(0, 99))
def test_nibbles(m: int, half: int, high_first: bool, seed: int) -> None:
    drawn = codes(m, 2 * half, seed)
    packed = join_nibbles(drawn, high_first)
    assert packed.shape == (m, half)
    assert torch.equal(split_nibbles(packed, high_first), drawn)
    assert torch.equal(split_nibbles(packed, not high_first).unflatten(1, (-1, 2)).flip(2).flatten(1), drawn)


@few
@given(ROWS, st.integers(1, 5), st.sampled_from([("int4", 32), ("int4", 64), ("nf4", 64)]), st.integers(0, 99))
def test_words(m: int, chunks: int, how: tuple[str, int], seed: int) -> None:
    name, chunk = how
    drawn = codes(m, chunks * chunk, seed)
    words = to_words(drawn, name, chunk)
    assert words.shape == (-(-m // 16), chunks, 32, chunk // 16)
    assert torch.equal(from_words(words, name, m), drawn)
    assert from_words(words, name, 16 * len(words))[m:].eq(0).all()


@few
@given(ROWS, st.integers(1, 9))
def test_tiles(m: int, groups: int) -> None:
    drawn = torch.arange(1, m * groups + 1, device=DEVICE).view(m, groups)
    tiles = to_tiles(drawn)
    assert tiles.shape == (-(-m // 16), groups, 8, 2)
    assert torch.equal(from_tiles(tiles, m), drawn)
    assert int((tiles == 0).sum()) == tiles.numel() - drawn.numel()


@few
@given(ROWS, st.integers(1, 4), st.sampled_from(GROUPS), st.booleans(), st.integers(0, 99))
def test_int4_there_and_back(m: int, groups: int, group: int, symmetric: bool, seed: int) -> None:
    packed = quantize_int4(numbers(m, groups * group, seed), group, symmetric)
    fragments = repack_int4(packed)
    for found, wanted in zip(unpack_int4(fragments), packed, strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or (found.dtype == wanted.dtype and torch.equal(found, wanted))
    assert torch.equal(dequantize_int4(fragments), dequantize_int4(packed))


@few
@given(ROWS, st.integers(1, 5), st.integers(0, 99))
def test_nf4_there_and_back(m: int, blocks: int, seed: int) -> None:
    w = numbers(m, blocks * BLOCK, seed)
    packed = quantize_nf4(w)
    fragments = repack_nf4(packed)
    back = unpack_nf4(fragments)
    assert torch.equal(back.codes, packed.codes)
    assert torch.equal(back.absmax, packed.absmax)
    read = dequantize_nf4(packed)
    assert torch.equal(dequantize_nf4(fragments), read)
    widest = max(b - a for a, b in pairwise(LEVELS)) / 2
    assert ((read - w).abs() <= widest * 1.0001 * packed.absmax.repeat_interleave(BLOCK, 1)).all()


@few
@given(ROWS, st.integers(1, 300), st.sampled_from(GROUPS), st.booleans())
def test_groups_divide_or_are_refused(m: int, n: int, group: int, symmetric: bool) -> None:
    w = torch.ones(m, n, device=DEVICE)
    if n % group:
        with pytest.raises(RankwiseError, match=f"number of columns {group} divides"):
            quantize_int4(w, group, symmetric)
    else:
        assert quantize_int4(w, group, symmetric).scale.shape == (m, n // group)
    if n % BLOCK:
        with pytest.raises(RankwiseError, match=f"number of columns {BLOCK} divides"):
            quantize_nf4(w)
    else:
        assert quantize_nf4(w).absmax.shape == (m, n // BLOCK)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)], ids=["no-rows", "no-columns"])
def test_empty_matrices_are_refused(shape: tuple[int, int]) -> None:
    for quantise in (quantize_int4, quantize_nf4):
        with pytest.raises(RankwiseError, match="a matrix, not empty"):
            quantise(torch.ones(shape, device=DEVICE))
