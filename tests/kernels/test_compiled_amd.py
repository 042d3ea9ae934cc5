"""Kernels also compile for an AMD GPU, and would fit its local memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.ahead_amd import LOCAL
from rankwise.kernels.backend import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed: no wheel for this platform")


def test_nothing_spills_and_all_fit() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-m", "bench.ahead_amd"], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["family"] for row in rows} == {"masked", "packed", "attention", "runtime", "svd"}
    assert all(row["seen"] and not row["spills"] for row in rows)
    assert all(row["local"] <= LOCAL * 1024 for row in rows)
