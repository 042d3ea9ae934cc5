"""The project's own tests of kernels, on the device."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LEFT_OUT = ("test_compiled.py", "test_compiled_amd.py")  # they need no device
WORKERS = "8"  # most of the time goes into compiling


def check(minutes: float) -> dict[str, Any]:
    """Run them; what was seen until then if time runs out.

    Returns:
        The row of the result file: pytest's last line, its exit code (None: no time), the tests that failed.
    """
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-rf", "-p", "no:cacheprovider"]
    command += [f"--ignore=tests/kernels/{name}" for name in LEFT_OUT]
    command += ["-n", WORKERS, "-v"] if importlib.util.find_spec("xdist") else ["-v"]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = run.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(run.pid, signal.SIGKILL)  # the workers too, which hold the device
            run.wait()
        log.seek(0)
        output = log.read()
    print(output[-6000:] if code else "", flush=True)  # noqa: T201
    failed = sorted(set(re.findall(r"^FAILED (tests/.+?)(?: - |$)", output, re.MULTILINE)))
    passed = len(set(re.findall(r"PASSED (tests/[^ \n]+)|(tests/[^ \n]+) PASSED", output)))
    summary = output.strip().splitlines()[-1] if code is not None else f"out of time: {passed} passed until then"
    return {"id": "tests", "summary": summary, "exit": code, "failed_tests": failed, "wall": time.monotonic() - started}
