"""The inline assembly, which the interpreter cannot run, read by a small interpreter of our own.

It must give what the plain kernel gives: the numbers of a word's codes, each in its place.
"""

import re
import struct
from collections.abc import Callable

import pytest
import torch

from rankwise.kernels import int4, nf4  # noqa: F401  (they leave their decoders)
from rankwise.kernels.fragments import DECODERS, MINUS

DTYPES = [torch.bfloat16, torch.float16]
FULL = 0xFFFFFFFF


def number(bits: int, dtype: torch.dtype) -> float:
    """A 16-bit pattern as a float."""
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0] if dtype == torch.bfloat16 else struct.unpack(
        "<e", struct.pack("<H", bits))[0]  # fmt: skip


def bits_of(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(value, dtype=torch.float64).to(dtype).view(torch.int16)) & 0xFFFF


def permuted(a: int, b: int, selector: int) -> int:
    """`prmt.b32`: bytes of b:a by four selectors of three bits; the fourth, which repeats a sign, must not be set."""
    both = a | b << 32
    chosen = [selector >> 4 * k & 15 for k in range(4)]
    assert max(chosen) < 8
    return sum((both >> 8 * place & 255) << 8 * k for k, place in enumerate(chosen))


def halves(function: Callable[[float, float, float], float], dtype: torch.dtype) -> Callable[..., int]:
    def both(a: int, b: int, c: int) -> int:
        parts = [
            bits_of(function(*(number(x >> shift & 0xFFFF, dtype) for x in (a, b, c))), dtype) for shift in (0, 16)
        ]
        return parts[0] | parts[1] << 16

    return both


def run(ptx: str, dtype: torch.dtype, word: int, zeros: tuple[int, int]) -> list[float]:
    """Eight numbers that a block of PTX makes of a word."""
    known = {"$8": word, "$9": zeros[0], "$10": zeros[1], "$11": 0}
    multiply_add = halves(lambda a, b, c: a * b + c, dtype)
    operations: dict[str, Callable[..., int]] = {
        "mov": lambda a: a,
        "xor": lambda a, b: a ^ b,
        "and": lambda a, b: a & b,
        "shr": lambda a, b: a >> b,
        "lop3": lambda a, b, c, table: a & b | c,
        "fma": multiply_add,
        "prmt": permuted,
    }
    for statement in ptx.strip("{}").split(";"):
        if not statement.strip() or ".reg" in statement:
            continue
        name, rest = statement.split(None, 1)
        pair = re.fullmatch(r"\{(\$\d), (\$\d)\}, (\w+)", rest.strip())
        if pair:
            low, high, source = pair.groups()
            known[low], known[high] = known[source] & 0xFFFF, known[source] >> 16
            continue
        target, *operands = [part.strip() for part in rest.split(",")]
        values = [known[part] if part in known else int(part, 0) for part in operands]
        assert name.split(".")[0] != "lop3" or values[3] == 0xEA
        known[target] = operations[name.split(".")[0]](*values) & FULL
    return [number(known[f"${k}"], dtype) for k in range(8)]


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
        found = run(how.ptx[dtype], dtype, word, (pairs[0], pairs[1]))
        codes = [word >> 4 * place(how.nibbles, k) & 15 for k in range(8)]
        if how.levels is None:
            assert found == [code - zeros[k >> 1 & 1] for k, code in enumerate(codes)]
        else:
            assert found == [float(torch.tensor(how.levels[code]).to(dtype)) for code in codes]
