"""nf4 is bitsandbytes' format, bit for bit: the bytes below were written by bitsandbytes 0.50.2 on a CPU."""

import pytest
import torch
from tensors import DEVICE, draw, relative_error

from rankwise.errors import RankwiseError
from rankwise.kernels.nf4 import LEVELS, NF4, dequantize_nf4, quantize_nf4, repack_nf4, unpack_nf4

# Of quantize_4bit(numbers(), blocksize=64, quant_type="nf4"), the first 96 bytes; the other 32 are 77.
WRITTEN = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d"
    "18e2a04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af"
)
ABSMAX = [[1.5625, 1.5625], [1.5625, 0.0]]
SQUARES = 161.96266779047926  # sum of squares of dequantize_4bit


def numbers() -> torch.Tensor:
    w = (((torch.arange(256, device=DEVICE) * 37) % 101 - 50) / 32).view(2, 128)
    w[1, 64:] = 0
    return w


def test_bytes_are_those_of_bitsandbytes() -> None:
    packed = quantize_nf4(numbers())
    assert bytes(packed.codes.flatten().tolist()) == bytes.fromhex(WRITTEN) + b"\x77" * 32
    assert packed.absmax.tolist() == ABSMAX
    assert packed.absmax.dtype == torch.float32


def test_bytes_of_bitsandbytes_are_read() -> None:
    codes = torch.tensor(list(bytes.fromhex(WRITTEN) + b"\x77" * 32), dtype=torch.uint8, device=DEVICE).view(2, 64)
    read = dequantize_nf4(NF4(codes, torch.tensor(ABSMAX, device=DEVICE)))
    assert float(read.double().square().sum()) == pytest.approx(SQUARES, rel=1e-14)
    assert relative_error(read, numbers()) < 0.12
    assert read[1, 64:].eq(0).all()


def test_ties_go_to_the_lower_code() -> None:
    levels = torch.tensor(LEVELS, device=DEVICE)
    w = torch.cat([(levels[1:] + levels[:-1]) / 2, levels, torch.zeros(33, device=DEVICE)])[None]
    found = bytes(quantize_nf4(w).codes.flatten().tolist()).hex()
    assert found == "0123456789abcde0123456789abcdef" + "7" * 33


def test_levels_stay() -> None:
    levels = torch.tensor(LEVELS, device=DEVICE).repeat(4)
    w = levels[None] * torch.tensor([[0.25], [3.0]], device=DEVICE)
    assert torch.equal(dequantize_nf4(quantize_nf4(w)), w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounded_once(dtype: torch.dtype) -> None:
    packed = quantize_nf4(draw(8, 128, dtype=dtype))
    assert torch.equal(dequantize_nf4(packed, dtype), dequantize_nf4(packed).to(dtype))


@pytest.mark.parametrize("m", [1, 16, 37])
def test_repacking_has_an_inverse(m: int) -> None:
    packed = quantize_nf4(draw(m, 192, dtype=torch.float32))
    back = unpack_nf4(repack_nf4(packed))
    assert torch.equal(back.codes, packed.codes)
    assert torch.equal(back.absmax, packed.absmax)


def test_extremes() -> None:
    w = torch.zeros(3, 64, device=DEVICE)
    w[1] = 3e38
    w[2, 5] = -1e-30
    assert relative_error(dequantize_nf4(quantize_nf4(w)), w) < 1e-6


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(RankwiseError):
        quantize_nf4(torch.ones(4, 96))
    packed = quantize_nf4(draw(4, 128, dtype=torch.float32))
    with pytest.raises(RankwiseError):
        repack_nf4(NF4(packed.codes, packed.absmax[:, :1]))
