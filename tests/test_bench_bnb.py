"""What bench/bnb.py and bench/memory.py count."""

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.bnb import compared
from bench.memory import held
from rankwise.kernels.nf4 import LEVELS, quantize_nf4


def packed(w: torch.Tensor) -> SimpleNamespace:
    """As bitsandbytes keeps a matrix."""
    codes, absmax = quantize_nf4(w)
    return SimpleNamespace(data=codes.view(-1, 1), quant_state=SimpleNamespace(absmax=absmax.flatten()))


def test_only_ties_may_differ() -> None:
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    w[1, :2] = torch.tensor([3.0, 3 * (LEVELS[4] + LEVELS[5]) / 2])  # the block's largest, and a tie
    w[1, 2:64].clamp_(-2, 2)
    theirs = packed(w)
    assert compared(w, theirs) == {"all": 512, "differing": 0, "ties": 0, "absmax_differing": 0}
    theirs.data[64] += 1  # the low half of row 1's first byte: from level 4 to level 5
    assert compared(w, theirs) == {"all": 512, "differing": 1, "ties": 1, "absmax_differing": 0}
    theirs.data[64] += 1  # no neighbour
    theirs.data[0] ^= 0x10  # a neighbour, and no tie
    theirs.quant_state.absmax[3] *= 2
    assert compared(w, theirs) == {"all": 512, "differing": 2, "ties": 0, "absmax_differing": 1}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what a process holds there")
def test_memory_is_told_from_mapped_files(tmp_path: Path) -> None:
    size = 32 << 20
    before = held(tmp_path)
    # not torch.ones: an allocator may hand out pages that it has already
    pages = mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    made = torch.frombuffer(pages, dtype=torch.float32)
    made.fill_(1)
    assert held(tmp_path)["anonymous"] - before["anonymous"] == pytest.approx(size, abs=4 << 20)
    save_file({"a": made}, tmp_path / "a.safetensors")
    file = load_file(tmp_path / "a.safetensors")  # mapped: its pages come when they are read
    assert float(file["a"].sum()) == size // 4
    taken = held(tmp_path)
    assert taken["mapped"] - before["mapped"] + taken["anonymous"] - before["anonymous"] >= 2 * size - (4 << 20)
    del file
    assert held(tmp_path)["mapped"] == before["mapped"]
