"""The GPU suite's contests as pytest-benchmark tests, for a person who compares two commits:

    pytest bench/test_gpu_kernels.py --benchmark-autosave
    pytest bench/test_gpu_kernels.py --benchmark-compare

A call is timed with the launch and a synchronisation, on inputs that may lie in the cache; the suite's own figures
(`python -m bench.gpu.suite`) are without both.
"""

from typing import Any

import pytest
import torch

from bench.gpu.measure import error
from bench.gpu.suite import works
from bench.gpu.work import Work

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a CUDA device")
WORKS = [pytest.param(work, id=f"{work.id} {work.name}") for _, work in works(None)]


@pytest.mark.parametrize("who", ["ours", "peers"])
@pytest.mark.parametrize("work", WORKS)
def test_call(work: Work, who: str, benchmark: Any) -> None:
    torch.cuda.empty_cache()
    contest = work.build(torch.device("cuda"))
    calls = [contest.ours] if who == "ours" else list(contest.peers.values())
    if who == "ours":
        assert error(contest.ours(), contest.reference()) <= contest.tolerance

    def run() -> None:
        for call in calls:
            call()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
