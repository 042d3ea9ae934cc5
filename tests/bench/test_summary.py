"""The arithmetic of a row."""

import numpy as np
import pytest

from rankwise.bench.arrivals import Request
from rankwise.bench.config import Load
from rankwise.bench.memory import Footprint
from rankwise.bench.summary import Round, batch_row, is_good, load_row, measured, percentile

PRINT = Footprint(weights=1000, step=800, token=10, windows=[None, 4])


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("share", [1, 50, 95, 99])
def test_percentile_equals_numpy(count: int, share: int) -> None:
    values = np.random.default_rng(count).exponential(size=count).tolist()
    assert percentile(values, share) == pytest.approx(np.percentile(values, share))


def test_keys_of_a_window_are_counted_up_to_it() -> None:
    assert PRINT.kv_bytes(3) == 10 * (3 + 3)
    assert PRINT.kv_bytes(20) == 10 * (20 + 4)


def test_a_row_is_the_arithmetic_of_its_rounds() -> None:
    """Two sequences of three tokens; the other contestant takes twice as long."""
    fast = [Round([[1.0, 1.5, 2.0], [2.0, 2.5, 4.0]], 4.0, 70, 3000.0), Round([[1.0, 1.5, 2.0]] * 2, 2.0, 60, 6000.0)]
    slow = [Round([[2 * t for t in times] for times in r.stamps], 2 * r.seconds, 50, r.bandwidth) for r in fast]
    row = batch_row(slow, fast, PRINT, prompt=8)
    assert row["ttft_ms_p50"] == pytest.approx(np.percentile([2000, 4000, 2000, 2000], 50))
    assert row["ttft_ms_p99"] == pytest.approx(np.percentile([2000, 4000, 2000, 2000], 99))
    assert row["tpot_ms_p95"] == pytest.approx(np.percentile([1000, 1000, 1000, 3000, 1000, 1000, 1000, 1000], 95))
    assert row["tokens_per_s_by_round"] == [6 / 8, 6 / 4]
    assert row["tokens_per_s"] == pytest.approx(np.percentile([6 / 8, 6 / 4], [20, 50, 80]))
    assert row["decode_tokens_per_s"] == pytest.approx(2)
    read = 800 + 2 * 10 * (9 + 4)  # the middle of the output is its second token
    assert row["step_bytes"] == read
    assert row["mbu_percent"] == pytest.approx(np.percentile([100 * read / 3000, 100 * read / 6000], [20, 50, 80]))
    assert row["kv_bytes"] == 2 * 10 * (11 + 4)
    assert (row["peak_bytes"], row["weight_memory_bytes"]) == (50, 1000)
    assert row["vs_first"] == {"ttft": [2, 2, 2], "tpot": [2, 2, 2], "tokens_per_s": [0.5, 0.5, 0.5]}


def test_good_requests_meet_both_limits() -> None:
    load = Load(rate=1, ttft_limit=1.0, tpot_limit=0.5)
    assert is_good([1.0, 1.5, 2.0], load)
    assert not is_good([1.1, 1.2, 1.3], load)
    assert not is_good([0.1, 0.2, 1.4], load)


def test_arrivals_are_taken_off_and_good_ones_counted() -> None:
    load = Load(rate=1, ttft_limit=1.0, tpot_limit=0.5)
    trace = [Request(0.0, [1], 2), Request(3.0, [1], 2)]
    round_ = measured({"stamps": [[0.5, 1.0], [5.0, 5.5]], "peak": 9}, 1.0, trace)
    assert round_.stamps == [[0.5, 1.0], [2.0, 2.5]]
    row = load_row([round_], [round_], load)
    assert row["e2e_ms_p50"] == pytest.approx(1750)
    assert row["good_share"] == 0.5
    assert row["goodput_per_s"] == pytest.approx([1 / 5.5] * 3)
    assert row["requests_per_s"] == pytest.approx([2 / 5.5] * 3)
    assert row["vs_first"]["e2e"] == [1, 1, 1]
