"""The GPU suite's contests as pytest-benchmark tests, for a person who compares two commits:

    pytest bench/test_gpu_kernels.py --benchmark-autosave
    pytest bench/test_gpu_kernels.py --benchmark-compare

A call is timed with the launch and a synchronisation, on inputs that may lie in the cache; the suite's own figures
(`python -m bench.gpu.suite`) are without both. Steps of whole models are timed by the suite alone.
"""

from typing import Any

import pytest
import torch

from bench.gpu.measure import error
from bench.gpu.suite import works
from bench.gpu.work import Work

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a CUDA device")
WORKS = [pytest.param(work, id=f"{work.id} {work.name}") for _, work in works(None) if not work.tokens]
PEERS = 3  # of a contest at most; their names are known when it is built


@pytest.mark.parametrize("who", ["ours", *range(PEERS)])
@pytest.mark.parametrize("work", WORKS)
def test_call(work: Work, who: str | int, benchmark: Any) -> None:
    torch.cuda.empty_cache()
    contest = work.build(torch.device("cuda"))
    assert len(contest.peers) <= PEERS
    calls = {"ours": contest.ours} | contest.peers
    name = who if isinstance(who, str) else dict(enumerate(contest.peers)).get(who)
    if contest.clock is not None or name is None:
        pytest.skip("has a clock of its own" if contest.clock is not None else "no such peer")
    benchmark.group = f"{work.id} {work.name}"
    benchmark.name = benchmark.fullname = f"{benchmark.group}: {name}"

    def run() -> Any:
        answer = calls[name]()
        torch.cuda.synchronize()
        return answer

    rounds = {"rounds": 1, "warmup_rounds": 0} if work.once else {"rounds": 20, "warmup_rounds": 3}
    answer = benchmark.pedantic(run, **rounds)
    if who == "ours":
        assert error(answer, contest.reference()) <= contest.tolerance
