"""A small interpreter of the inline assembly that kernels decode weights with; Triton's own cannot run it."""

import re
import struct
from collections.abc import Callable

import torch

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


def run(ptx: str, dtype: torch.dtype, inputs: dict[str, int], words: int = 0, halves_out: int = 0) -> list[float]:
    """The numbers that a block of PTX makes.

    Args:
        ptx: its results are `$0` and so on.
        dtype: of the numbers, 16 bits.
        inputs: registers and what they hold.
        words: results that are registers of two numbers.
        halves_out: results that are one number each.
    """
    known = dict(inputs)
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
    bits = [known[f"${k // 2}"] >> 16 * (k % 2) & 0xFFFF for k in range(2 * words)]
    return [number(each, dtype) for each in bits or [known[f"${k}"] for k in range(halves_out)]]
