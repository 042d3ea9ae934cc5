"""The project's own tests of kernels and of what runs them on a GPU, on the device."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KERNELS = "tests/kernels"
WHOLE = ("tests/engine/runtime/test_graphs.py", "tests/engine/runtime/test_mixed.py", "tests/alloc/test_pivots.py")
LEFT_OUT = ("compiled", "compiled_amd", "fourbit_ptx", "host", "native", "native_linear")  # they need no device
WORKERS = "12"  # most of the time goes into compiling


def check(minutes: float) -> dict[str, Any]:
    """Run them, kernels first; what was seen until then if time runs out.

    Returns:
        The row of the result file: pytest's last line, its exit code (None: no time), the tests that failed.
    """
    command = [sys.executable, "-m", "pytest", KERNELS, *WHOLE, "-vv", "-rf", "-p", "no:cacheprovider"]
    command += [f"--ignore={KERNELS}/test_{name}.py" for name in LEFT_OUT]
    command += ["-n", WORKERS] if importlib.util.find_spec("xdist") else []
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = run.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # the workers too, which hold the device
            run.wait()
        log.seek(0)
        output = log.read()
    print(output[-6000:] if code else "", flush=True)  # noqa: T201
    failed, passed = sorted(said("FAILED", output) | said("ERROR", output)), len(said("PASSED", output))
    last = (output.strip().splitlines() or ["pytest said nothing"])[-1]
    summary = last if code is not None else f"out of time: {len(failed)} failed, {passed} passed until then"
    return {"id": "tests", "summary": summary, "exit": code, "failed_tests": failed, "wall": time.monotonic() - started}


def said(verdict: str, output: str) -> set[str]:
    """Tests with a verdict, from pytest's lines as they come, of one process or of many, and from its summary."""
    found = re.findall(rf"^(?:\[gw\d+\] \[ *\d+%\] )?{verdict} (tests/.+?)(?: - .*|\s*)$", output, re.MULTILINE)
    found += re.findall(rf"^(tests/.+?) {verdict}(?: +\[ *\d+%\])?$", output, re.MULTILINE)
    return set(found)
