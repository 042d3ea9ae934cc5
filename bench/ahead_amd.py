"""Compile kernels ahead of time for an AMD Instinct (gfx942): vector registers spilt, local memory taken.

    python -m bench.ahead_amd

A first look only: nothing has run on such a device. The 4-bit kernels are left out, whose inner loops are PTX.
"""

import importlib
import json
import re
from collections.abc import Iterator
from typing import Any

from bench.ahead import compile_launch
from rankwise.kernels.backend import backend, recording

TARGET = "hip", "gfx942", 64
LOCAL = 64  # KiB of local memory that a work-group may have (CDNA 3 ISA)
FAMILIES = ("masked", "packed", "attention", "runtime", "svd")
CASES = 2  # the first of each family


def report(family: str) -> Iterator[dict[str, Any]]:
    """One row for each launch of a family's first cases."""
    for case in importlib.import_module(f"bench.compiled.{family}").CASES[:CASES]:
        with backend("triton"), recording() as launches:
            case.call()
        for launch in launches:
            made = compile_launch(launch, *TARGET)
            spilt = [int(count) for count in re.findall(r"vgpr_spill_count:\s+(\d+)", made.asm["amdgcn"])]
            row = {"family": family, "case": case.name, "kernel": launch.kernel.__name__}
            yield row | {"spills": sum(spilt), "local": int(made.metadata.shared), "seen": len(spilt)}


if __name__ == "__main__":
    for family in FAMILIES:
        for row in report(family):
            print(json.dumps(row), flush=True)  # noqa: T201
