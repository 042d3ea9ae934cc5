"""A server in a process of its own, and what a test asks it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

SCRIPT = Path(sys.executable).with_name("rankwise")


@dataclass(frozen=True)
class Served:
    """A running server.

    Args:
        process: its process.
        url: without `/v1`.
        model: the name it answers to.
    """

    process: subprocess.Popen[str]
    url: str
    model: str

    def openai(self, key: str = "any", **options: Any) -> OpenAI:
        """The real client; it tries nothing twice unless told to."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **options})

    def post(self, path: str = "completions", **body: Any) -> httpx.Response:
        """A bare request."""
        return httpx.post(f"{self.url}/v1/{path}", json={"model": self.model, **body}, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """A sample of `/metrics`; 0 where there is none yet."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == f"rankwise_{name}"]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def wait(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        """Until something holds, which must be soon."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.01)

    def empty(self) -> bool:
        """Whether no sequence waits or runs, and no block of the cache is held."""
        return all(self.metric(name) == 0 for name in ("queue_length", "running", "kv_blocks_used"))

    def rss(self) -> int:
        """Bytes of memory that the process has."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def stopped(self, seconds: float = 30) -> tuple[int, str]:
        """Exit code and stderr, when it has ended."""
        _, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, err


@contextmanager
def serve(folder: Path, *options: str, **environment: str) -> Iterator[Served]:
    """`rankwise serve` on a free port; it is told to end afterwards, and must."""
    command = [
        str(SCRIPT),
        "serve",
        str(folder),
        "--port",
        "0",
        "--json",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        *options,
    ]
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | threads | environment, **pipes)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        facts = json.loads(line)
        yield Served(process, facts["url"], facts["model"])
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
