"""Four times as many clients as the server has places."""

import asyncio
from pathlib import Path

from served import serve

from bench.overload import Seen, Work, complaints, figures, press


def test_what_is_accepted_under_four_times_the_load_completes(chatty: Path) -> None:
    places, work = 2, Work(prompt=8, tokens=200, requests=24)
    limits = ["--max-sequences", str(places), "--max-queue", "1", "--kv-tokens", "4096"]
    with serve(chatty, "--name", "tiny", *limits) as server:
        seen = asyncio.run(press(server.url, "tiny", 4 * places, work))
        assert set(seen.ended) == {"completed", "refused"}  # refused: with a time to wait
        assert seen.ended["completed"] >= work.requests
        assert seen.ended["refused"] >= 4 * places - 3
        assert seen.running == places
        server.wait(server.empty)
        for outcome, count in (("completed", seen.ended["completed"]), ("overloaded", seen.ended["refused"])):
            assert server.metric("requests_total", outcome=outcome) == count
        assert server.metric("requests_total") == seen.ended.total()
        assert server.post(prompt="x", max_tokens=1).status_code == 200


def test_slower_tokens_and_other_ends_are_complained_of() -> None:
    def load(each: float, running: int = 2, **ended: int) -> Seen:
        seen = Seen(first=[0.1] * 8, each=[each] * 8, running=running, seconds=1.0)
        seen.ended.update({"completed": 8, **ended})
        return seen

    def found(low: Seen, high: Seen) -> list[str]:
        return complaints({"1x": figures(low, 4), "4x": figures(high, 4)}, 2, 1.5)

    assert found(load(0.1), load(0.14, refused=5)) == []
    assert found(load(0.1), load(0.16)) == ["time per token, p50: 1.60 times", "time per token, p95: 1.60 times"]
    assert found(load(0.1), load(0.1, running=3, lost=1)) == ["4x: lost", "4x: 3 ran"]
    assert found(load(0.1), Seen(seconds=1.0)) == ["too few requests completed"]
