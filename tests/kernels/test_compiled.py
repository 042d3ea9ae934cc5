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
    """From a process of its own: here the interpreter may stand in for the compiler."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
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
def test_instructions_per_weight_are_within_the_budget(family: str) -> None:
    slow = [row for row in rows(family) if row.get("per_weight", 0) > row.get("budget", 0)]
    assert not slow
