"""Every kernel compiles ahead of time for every chip: no spills, shared memory within the chip, the loads expected."""

import importlib
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from rankwise.kernels.backend import AVAILABLE

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(path.stem for path in (ROOT / "bench" / "compiled").glob("*.py"))
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed: no wheel for this platform")


@lru_cache
def rows(family: str) -> list[dict[str, Any]]:
    """From a process of its own: here the interpreter may stand in for the compiler.

    Triton's default for fused products and sums is the one to come: kernels say what they want.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"
    command = [sys.executable, "-m", "bench.ahead", family]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_made_kernels(family: str) -> None:
    cases = importlib.import_module(f"bench.compiled.{family}").CASES
    expected = {(case.name, arch) for case in cases for arch in case.archs}
    assert {(row["case"], row["arch"]) for row in rows(family)} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_is_compiled_for_every_chip(family: str) -> None:
    from bench.ahead import ARCHS

    made = {(row["kernel"], row["arch"]) for row in rows(family)}
    assert made == {(kernel, arch) for kernel, _ in made for arch in ARCHS}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_spills(family: str) -> None:
    spilt = [row for row in rows(family) if row["local"] or row["stack"] or row["spills"]]
    assert not spilt


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_memory_is_within_the_chip(family: str) -> None:
    from bench.ahead import SHARED

    large = [row for row in rows(family) if row["shared"] > SHARED[row["arch"]] * 1024]
    assert not large


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expected_instructions_are_there(family: str) -> None:
    wrong = [row for row in rows(family) if row["missing"] or row["load_bits"] < row["wanted_load_bits"]]
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_no_loop_reads_in_small_pieces(family: str) -> None:
    slow = [row for row in rows(family) if row["narrow"] > row["most_narrow"] or row["wide"] < row["least_wide"]]
    assert not slow


@pytest.mark.parametrize("family", FAMILIES)
def test_whoever_follows_asks_for_weights_before_it_waits(family: str) -> None:
    late = [row for row in rows(family) if row["early"] == 0]
    assert not late


@pytest.mark.parametrize("family", FAMILIES)
def test_instructions_per_weight_are_within_the_budget(family: str) -> None:
    slow = [row for row in rows(family) if not 0 < row.get("per_weight", 1) <= row.get("budget", 1)]
    assert not slow


LISTING = """
LDG.E.128 R0, [R2]
ACQBULK
.L_x_1:
LDG.E.U16 R4, [R2]
.L_x_2:
LDGSTS.E.BYPASS.128 [R5], [R2]
@P0 BRA `(.L_x_2)
.L_x_3:
LDG.E R1, [R2]
@P1 BRA `(.L_x_1)
LDG.E R1, [R2]
EXIT
SYNCS R0
@P2 BRA `(.L_x_3)
.L_x_4:
BRA `(.L_x_4)
"""


def test_loops_are_read_from_machine_code() -> None:
    """One within the other; neither the stop at the end, nor a wait that lies behind the exit and branches back."""
    from bench.ahead import early_loads, is_narrow, loops

    lines = LISTING.strip().splitlines()
    sass = "\n".join(line if line.startswith(".") else f"/*{i:04x}*/ {line} ;" for i, line in enumerate(lines))
    found = loops(sass)
    assert [len(loop) for loop in found] == [2, 5]
    assert [sum(map(is_narrow, loop)) for loop in found] == [0, 2]
    assert early_loads(sass) == 1
    assert early_loads(sass.replace("ACQBULK", ".L_x_0:\n/*0000*/ ACQBULK")) == 0
    assert early_loads("") is None
