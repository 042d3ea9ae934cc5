"""The int4 format: what is rounded how, in which byte it lies, and that repacking loses nothing."""

import pytest
import torch
from tensors import DEVICE, draw, relative_error

from rankwise.errors import RankwiseError
from rankwise.kernels.fragments import Fragments
from rankwise.kernels.int4 import Int4, dequantize_int4, int4_linear, quantize_int4, repack_int4, unpack_int4

GROUPS = [32, 64, 128]
groups = pytest.mark.parametrize("group", GROUPS)
kinds = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


@groups
@kinds
def test_each_number_is_within_half_a_step(group: int, symmetric: bool) -> None:
    w = draw(10, 256, dtype=torch.float32)
    packed = quantize_int4(w, group, symmetric)
    step = packed.scale.float().abs().repeat_interleave(group, 1)
    # A symmetric group reaches 8 steps to one side and 7 to the other; what lies beyond is cut.
    inside = w.sign() * packed.scale.float().sign().repeat_interleave(group, 1) * w.abs() <= 7.5 * step
    error = (dequantize_int4(packed) - w).abs()
    slack = 1.02 if symmetric else 1.2  # the zero point, and bf16, may push an end of the range over
    assert (error <= 0.5 * slack * step)[inside].all()


@groups
@kinds
def test_repacking_has_an_inverse(group: int, symmetric: bool) -> None:
    for m in (1, 16, 37):
        packed = quantize_int4(draw(m, 256, dtype=torch.float32), group, symmetric)
        back = unpack_int4(repack_int4(packed))
        assert torch.equal(back.codes, packed.codes)
        assert torch.equal(back.scale, packed.scale)
        assert (back.zero is None) == symmetric
        assert symmetric or torch.equal(back.zero, packed.zero)


@kinds
def test_what_the_codes_can_say_stays(symmetric: bool) -> None:
    packed = quantize_int4(draw(5, 128, dtype=torch.float32), 64, symmetric)
    numbers = dequantize_int4(packed)
    again = quantize_int4(numbers, 64, symmetric)
    assert relative_error(dequantize_int4(again), numbers) < 0.06
    halves = torch.arange(-8, 8, device=DEVICE).repeat(4)[None] * 0.25
    assert torch.equal(dequantize_int4(quantize_int4(halves, 64, symmetric)), halves)


def test_the_low_nibble_comes_first() -> None:
    w = torch.zeros(1, 32, device=DEVICE)
    w[0, :4] = torch.tensor([-8.0, 1.0, 7.0, -1.0])
    packed = quantize_int4(w, 32)
    assert packed.codes[0, :3].tolist() == [0x90, 0x7F, 0x88]
    assert packed.scale.tolist() == [[1.0]]


@kinds
def test_extremes(symmetric: bool) -> None:
    w = torch.zeros(4, 32, device=DEVICE)
    w[1] = 3e38
    w[2, 5] = -1e-30
    w[3] = 1.0
    numbers = dequantize_int4(quantize_int4(w, 32, symmetric))
    assert numbers.isfinite().all()
    assert numbers[0].eq(0).all()
    assert relative_error(numbers, w) < 0.01


def test_cost_of_groups() -> None:
    w = draw(64, 1024, dtype=torch.float32)
    errors = [relative_error(dequantize_int4(quantize_int4(w, group)), w) for group in GROUPS]
    assert errors == sorted(errors)
    assert errors[-1] < 0.11
    asymmetric = relative_error(dequantize_int4(quantize_int4(w, 128, symmetric=False)), w)
    assert asymmetric < errors[-1]


def test_gradient_reaches_the_input_in_torch() -> None:
    packed = quantize_int4(draw(6, 64, dtype=torch.float32), 64)
    x = draw(3, 64).requires_grad_()
    int4_linear(x, packed).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, dequantize_int4(packed).sum(0).expand(3, 64)) < 1e-6


@pytest.mark.parametrize(("shape", "group"), [((4, 96), 64), ((4, 64), 48), ((64,), 64)])
def test_what_does_not_fit_is_said(shape: tuple[int, ...], group: int) -> None:
    with pytest.raises(RankwiseError):
        quantize_int4(torch.ones(shape), group)


def test_scales_of_another_matrix_are_refused() -> None:
    packed = quantize_int4(draw(6, 128, dtype=torch.float32), 64)
    for scale in (packed.scale[:5], packed.scale[:, :0], packed.scale.repeat(1, 8)):
        with pytest.raises(RankwiseError):
            repack_int4(Int4(packed.codes, scale))


def test_rows_of_a_tile_that_are_not_there_are_zero() -> None:
    w = repack_int4(quantize_int4(draw(18, 64, dtype=torch.float32), 64))
    assert isinstance(w, Fragments)
    assert w.words.shape == (2, 1, 32, 4)
    assert w.n == 64
    assert w.scale[1, :, 2:].eq(0).all()
