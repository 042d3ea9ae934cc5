"""Budgets of bytes: what `--size` and `--bits-per-weight` ask for, and what a checkpoint's weight files will take."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.plan import RankPlan
from rankwise.storage import CODED, FLOATS, INT4_GROUPS, ITEM_BYTES, WEIGHTS, Precision, require_native

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
SIZES = "a number of bytes, e.g. 5GB (5e9), 4.5GiB, 300MB"
BITS = 32.0  # the most that a weight can take
FILE = 4096  # bytes of a safetensors file beside its tensors' entries, from above


@dataclass(frozen=True)
class ByteBudget:
    """How many bytes a checkpoint may take, and in which precisions its layers may be stored.

    Args:
        size: bytes of all weight files, embeddings and everything else included; or None.
        bits: or bits for each number of the linear layers that the dense model had.
        precisions: to choose from.
        native: the model's own dtype is one of them, whatever that is.
    """

    size: int | None
    bits: float | None
    precisions: tuple[Precision, ...]
    native: bool = False

    def __post_init__(self) -> None:
        if (self.size is None) == (self.bits is None):
            raise RankwiseError("size", f"{self.size}, with bits_per_weight {self.bits}", "allowed: one of the two")
        if self.bits is not None and not (math.isfinite(self.bits) and 0 < self.bits <= BITS):
            raise RankwiseError("bits_per_weight", self.bits, f"allowed: above 0 and at most {BITS:g}")
        if self.size is not None and self.size < 1:
            raise RankwiseError("size", self.size, f"allowed: {SIZES}")

    def for_model(self, dtype: str) -> tuple[Precision, ...]:
        """The precisions to choose from for a model of one dtype, that dtype first if it is among them.

        Raises:
            RankwiseError: 16 or 32 bits other than the model's were asked for.
        """
        for precision in self.precisions:
            require_native(precision.weights, dtype)
        coded = [precision for precision in self.precisions if precision.quantised]
        own = [Precision(dtype)] if self.native or len(coded) < len(self.precisions) else []
        return (*own, *coded)


def parse_size(text: str) -> int:
    """`5GB` to bytes.

    Raises:
        RankwiseError: no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([KMGT]I?)?B?\s*", text, re.IGNORECASE)
    if not found:
        raise RankwiseError("size", text, f"allowed: {SIZES}")
    return int(float(found[1]) * UNITS[(found[2] or "").upper()])


def make_budget(
    size: str | None, bits: float | None, weights: str, group: int | None, asymmetric: bool
) -> ByteBudget | None:
    """A budget from the command line's options; None without `size` and `bits`.

    Args:
        size: as `parse_size` reads it.
        bits: for each number of the dense model's linear layers.
        weights: precisions joined by commas; `auto` is the model's own dtype, nf4, int4 and int8.
        group: of int4; None: 32, 64 and 128.
        asymmetric: of int4.

    Raises:
        RankwiseError: unknown weights, or options that do not belong to them.
    """
    if size is None and bits is None:
        return None
    names = list(CODED) if weights == "auto" else weights.split(",")
    found: list[Precision] = []
    for name in dict.fromkeys(names):
        if name not in WEIGHTS:
            raise RankwiseError("weights", name, f"allowed: {', '.join(WEIGHTS)}, several joined by commas")
        groups = INT4_GROUPS if group is None else (group,)
        found += [Precision(name, g, asymmetric) for g in groups] if name == "int4" else [Precision(name)]
    if "int4" not in names and (group is not None or asymmetric):
        field, value = ("asymmetric", asymmetric) if group is None else ("group", group)
        raise RankwiseError(field, value, "allowed: where int4 is among the weights")
    return ByteBudget(None if size is None else parse_size(size), bits, tuple(found), weights == "auto")


def budget_met(budget: ByteBudget, bits: float, size: int, tolerance: float) -> str:
    """One line on what a compressed model takes of its budget.

    Args:
        budget: what was asked for.
        bits: of the linear layers, for each number that the dense model had.
        size: bytes of the weight files.
        tolerance: relative; more than that left over is explained.
    """
    if budget.bits is not None:
        used, asked = bits, budget.bits
        line = f"{used:.4g} bits for each number of the linear layers; asked for: {asked:g}"
    else:
        assert budget.size is not None
        used, asked = size, budget.size
        line = f"{used} bytes; asked for: at most {asked}"
    if used < (1 - tolerance) * asked:
        line += f"; {1 - used / asked:.1%} stay unused: no layer gains by more, or the next step is larger"
    return line


def checkpoint_bytes(plan: RankPlan, others: Mapping[str, Any], dtype: str) -> int:
    """Bytes of the weight files that a plan leads to, from above by a few in a thousandth.

    Args:
        plan: kinds, ranks and precisions.
        others: name to tensor of everything in the model that is no weight of a linear layer.
        dtype: the model's own.
    """
    names: list[str] = list(others)
    total = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in others.values()}.values())
    for name, spec in plan:
        names += [f"{name}.{part}" for part in spec.tensors]
        total += spec.bytes
        if spec.recoded:  # the guard, see docs/checkpoint.md
            names.append(f"{name}.weight")
            total += ITEM_BYTES[FLOATS[dtype]]
    entry = len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},') + 10 + 2 * len(str(total))
    return total + sum(len(name) + entry for name in names) + FILE * (1 + total // 10**9)
