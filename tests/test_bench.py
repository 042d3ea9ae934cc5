"""`rankwise.bench` as a whole, in real processes: the numbers fit each other, trouble becomes one clear error."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import rankwise
from rankwise.bench import BenchConfig, Load, bench, line_up
from rankwise.errors import RankwiseError

WINDOWS = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))
LOAD = Load(rate=30.0, requests=5, mix=((8, 4), (20, 2)))
CONFIG = BenchConfig(prompts=(8,), new_tokens=4, rounds=2, batches=(1, 3), device="cpu", load=LOAD)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], tokenizer: Any) -> Path:
    model, _ = rankwise.load_model(str(model_folder("llama")))
    plan = rankwise.allocate(model, WINDOWS, rankwise.Global(ratio=0.6, rank_multiple=1))
    small = rankwise.compress(model, plan)
    return rankwise.save(small, tokenizer, plan, tmp_path_factory.mktemp("bench") / "small")


@pytest.fixture(scope="module")
def measured(model_folder: Callable[[str], Path], small_folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What two models in two engines came to, and the steps that were reported on the way."""
    steps = []

    @contextmanager
    def track(name: str, total: int) -> Iterator[Callable[[], None]]:
        steps.append(f"{name} {total}")
        yield lambda: steps.append("step")

    contestants = line_up([str(model_folder("llama")), str(small_folder)], ["rankwise", "transformers"])
    return bench(contestants, CONFIG, track=track), steps


def test_a_row_a_contestant_and_shape_in_the_order_asked(
    measured: Any, model_folder: Callable[[str], Path], small_folder: Path
) -> None:
    found, steps = measured
    who = [
        (model, engine) for model in (model_folder("llama"), small_folder) for engine in ("rankwise", "transformers")
    ]
    expected = [(batch, 8, str(model), engine) for batch in (1, 3) for model, engine in who]
    assert [(r["batch"], r["prompt"], r["name"], r["engine"]) for r in found["rows"]] == expected
    assert [(r["name"], r["engine"]) for r in found["load"]] == [(str(model), engine) for model, engine in who]
    # four contestants; two shapes and the load, two rounds and one that does not count
    assert steps == ["loading 4", *["step"] * 4, "timing 36", *["step"] * 36]


def test_numbers_of_a_row_fit_each_other(measured: Any) -> None:
    for row in measured[0]["rows"]:
        for what in ("ttft", "tpot"):
            assert 0 < row[f"{what}_ms_p50"] <= row[f"{what}_ms_p95"] <= row[f"{what}_ms_p99"] < 60_000
        low, middle, high = row["tokens_per_s"]
        assert 0 < low <= middle <= high
        slowest = 1000 * row["batch"] * 4 / row["tokens_per_s_by_round"][0]  # ms of the first round
        assert slowest >= row["ttft_ms_p50"] * 0.2
        assert row["decode_tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["tpot_ms_p50"])
        assert 10e6 < row["peak_bytes"] < psutil.virtual_memory().total
        assert row["dtype"] == "fp32"
        assert row["device"].startswith("CPU, ")
        assert row["versions"]["torch"] == torch.__version__
        assert (row["new_tokens"], row["rounds"]) == (4, 2)


def test_bytes_are_those_of_the_model(measured: Any) -> None:
    """Two layers, two heads of keys and values of 8 numbers in fp32; weights are those of the file."""
    token = 2 * 2 * 2 * 8 * 4
    for row in measured[0]["rows"]:
        stored = (Path(row["name"]) / "model.safetensors").stat().st_size
        assert row["weight_bytes"] == stored
        tensors = load_file(Path(row["name"]) / "model.safetensors").values()
        assert row["weight_memory_bytes"] == pytest.approx(sum(t.nbytes for t in tensors), rel=0.03)  # indices differ
        assert row["kv_bytes"] == row["batch"] * 12 * token
        head = 512 * 32 * 4  # tied to the embeddings, so it is read
        assert head < row["step_bytes"] <= row["weight_memory_bytes"] + row["batch"] * 10 * token
        low, middle, high = row["mbu_percent"]
        assert 0 < low <= middle <= high


def test_a_compressed_model_reads_less(measured: Any) -> None:
    sizes = {(Path(row["name"]).name, row["engine"]): row["step_bytes"] for row in measured[0]["rows"]}
    for engine in ("rankwise", "transformers"):
        assert sizes["small", engine] < sizes["llama", engine]


def test_ratios_are_to_the_first_contestant(measured: Any) -> None:
    for rows in (measured[0]["rows"][:4], measured[0]["load"]):
        assert rows[0]["vs_first"]["tpot"] == [1, 1, 1]
        for row in rows:
            for low, middle, high in row["vs_first"].values():
                assert 0 < low <= middle <= high
    first, other = measured[0]["rows"][:2]
    each = zip(other["tokens_per_s_by_round"], first["tokens_per_s_by_round"], strict=True)
    assert other["vs_first"]["tokens_per_s"][1] == pytest.approx(sum(a / b for a, b in each) / 2)


def test_rows_under_load(measured: Any) -> None:
    for row in measured[0]["load"]:
        assert row["rate"] == 30
        assert row["e2e_ms_p50"] >= row["ttft_ms_p50"]
        assert 0 <= row["good_share"] <= 1
        assert row["goodput_per_s"][1] <= row["requests_per_s"][1]


def test_no_process_is_left_behind(measured: Any) -> None:
    assert measured
    assert multiprocessing.active_children() == []


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="no such folder") as raised:
        bench(line_up([str(tmp_path / "nowhere")], ["transformers"]), CONFIG)
    assert raised.value.field == "model"
    assert str(tmp_path / "nowhere") in str(raised.value)
    for child in multiprocessing.active_children():  # it ends by itself
        child.join(timeout=30)
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_is_named(small_folder: Path) -> None:
    @contextmanager
    def kill_between_rounds(name: str, total: int) -> Iterator[Callable[[], None]]:
        def kill() -> None:
            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                child.join()

        yield kill

    with pytest.raises(RankwiseError, match="its process died") as raised:
        bench(line_up([str(small_folder)], ["rankwise"]), CONFIG, track=kill_between_rounds)
    assert str(small_folder) in str(raised.value)
