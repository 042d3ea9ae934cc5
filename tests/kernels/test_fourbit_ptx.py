"""The inline assembly of 4-bit kernels, read by a small interpreter of our own.

It must give what the plain kernel gives: the numbers of a word's codes, each in its place.
"""

import pytest
import torch
from ptx import run

from rankwise.kernels import int4, nf4  # noqa: F401  (they leave their decoders)
from rankwise.kernels.fragments import DECODERS, MINUS

DTYPES = [torch.bfloat16, torch.float16]


def place(nibbles: str, k: int) -> int:
    """Where in the word the code of number k lies, whose bits are q, b, p."""
    bits = {"q": k >> 2, "b": k >> 1 & 1, "p": k & 1}
    return sum(bits[axis] << 2 - at for at, axis in enumerate(nibbles))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_every_code_in_every_place(name: str, dtype: torch.dtype) -> None:
    how = DECODERS[name]
    zeros = (8, 3)
    pairs = tuple((MINUS[dtype] + zero) * 0x10001 for zero in zeros)
    words = [sum((code + 5 * k & 15) << 4 * k for k in range(8)) for code in range(16)]
    for word in words:
        inputs = {"$8": word, "$9": pairs[0], "$10": pairs[1], "$11": 0}
        found = run(how.ptx[dtype], dtype, inputs, halves_out=8)
        codes = [word >> 4 * place(how.nibbles, k) & 15 for k in range(8)]
        if how.levels is None:
            assert found == [code - zeros[k >> 1 & 1] for k, code in enumerate(codes)]
        else:
            assert found == [float(torch.tensor(how.levels[code]).to(dtype)) for code in codes]
