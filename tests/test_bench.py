"""Timing: the numbers fit each other, the gate stops nonsense, a worker's trouble becomes one clear error."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import rankwise
from rankwise import zoo
from rankwise.bench import BenchConfig, bench, percentile
from rankwise.bench import _Runner as Runner
from rankwise.errors import RankwiseError

WINDOWS = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))
CONFIG = BenchConfig(prompt=8, new_tokens=3, rounds=2, batch=2)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], tokenizer: Any) -> Path:
    model, _ = rankwise.load_model(str(model_folder("llama")))
    plan = rankwise.allocate(model, WINDOWS, rankwise.Global(ratio=0.6, rank_multiple=1))
    small = rankwise.compress(model, plan)
    return rankwise.save(small, tokenizer, plan, tmp_path_factory.mktemp("bench") / "small")


@pytest.fixture(scope="module")
def measured(model_folder: Callable[[str], Path], small_folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of two models, and the steps that were reported on the way."""
    steps = []

    @contextmanager
    def track(name: str, total: int) -> Iterator[Callable[[], None]]:
        steps.append(f"{name} {total}")
        yield lambda: steps.append("step")

    return bench([str(model_folder("llama")), str(small_folder)], CONFIG, track=track), steps


def test_a_row_a_model_in_the_order_asked(
    measured: Any, model_folder: Callable[[str], Path], small_folder: Path
) -> None:
    rows, steps = measured
    assert [row["name"] for row in rows] == [str(model_folder("llama")), str(small_folder)]
    assert steps == ["timing 6", *["step"] * 6]  # two models, two rounds and one that does not count


def test_numbers_of_a_row_fit_each_other(measured: Any) -> None:
    for row in measured[0]:
        for what in ("prefill", "decode"):
            assert 0 < row[f"{what}_ms_p50"] <= row[f"{what}_ms_p95"] < 60_000
        # tokens a second = batch / mean step; p50 and p95 bracket the mean of 6 steps within their range
        mean_step_ms = 1000 * CONFIG.batch / row["tokens_per_s"]
        assert mean_step_ms > 0.5 * row["decode_ms_p50"]
        assert mean_step_ms < 6 * row["decode_ms_p95"]
        assert 10e6 < row["peak_bytes"] < psutil.virtual_memory().total
        assert {key: row[key] for key in ("prompt", "new_tokens", "batch", "rounds")} == {
            "prompt": 8,
            "new_tokens": 3,
            "batch": 2,
            "rounds": 2,
        }
        assert row["dtype"] == "fp32"
        assert row["device"].startswith("CPU, ")
        assert row["versions"]["torch"] == torch.__version__


def test_bytes_are_those_of_the_folder(measured: Any) -> None:
    for row in measured[0]:
        assert row["weight_bytes"] == (Path(row["name"]) / "model.safetensors").stat().st_size


def test_no_process_is_left_behind(measured: Any) -> None:
    assert measured
    assert multiprocessing.active_children() == []


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="no such folder") as raised:
        bench([str(tmp_path / "nowhere")], CONFIG)
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
        bench([str(small_folder)], CONFIG, track=kill_between_rounds)
    assert str(small_folder) in str(raised.value)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("share", [1, 50, 95, 99])
def test_percentile_equals_numpy(count: int, share: int) -> None:
    values = np.random.default_rng(count).exponential(size=count).tolist()
    assert percentile(values, share) == pytest.approx(np.percentile(values, share))


@pytest.mark.parametrize("name", ["prompt", "new_tokens", "batch", "rounds"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_counts_are_checked(name: str, value: Any) -> None:
    with pytest.raises(RankwiseError, match=f"^{name}: .*allowed: a whole number from 1"):
        BenchConfig(**{name: value})


def test_rows_are_the_arithmetic_of_their_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers take turns, the first round of each is not counted, and the numbers are those of the others."""
    asked = []

    class Worker:
        def __init__(self, name: str, config: BenchConfig) -> None:
            self.name, self.round = name, 0

        def ask(self, what: str) -> dict[str, Any]:
            asked.append((self.name, what))
            if what == "facts":
                return {"device": "none"}
            self.round += 1
            slow = 100.0 if self.round == 1 else 1.0
            factor = 2.0 if self.name == "b" else 1.0
            return {"prefill": slow * factor * self.round, "steps": [slow * factor * step for step in (0.1, 0.2, 0.6)]}

        def stop(self) -> None:
            asked.append((self.name, "stop"))

    monkeypatch.setattr(rankwise.bench, "_Worker", Worker)
    first, second = bench(["a", "b"], BenchConfig(prompt=8, new_tokens=3, batch=4, rounds=2))
    assert asked[:6] == [("a", "round"), ("b", "round")] * 3
    assert asked[-2:] == [("a", "stop"), ("b", "stop")]
    steps = [100, 200, 600, 100, 200, 600]
    assert first["prefill_ms_p50"] == pytest.approx(2500)
    assert first["prefill_ms_p95"] == pytest.approx(np.percentile([2000, 3000], 95))
    assert first["decode_ms_p50"] == pytest.approx(np.percentile(steps, 50))
    assert first["decode_ms_p95"] == pytest.approx(np.percentile(steps, 95))
    assert first["tokens_per_s"] == pytest.approx(4 * 6 / 1.8)  # four sequences, six steps in 1.8 seconds
    assert second["tokens_per_s"] == pytest.approx(first["tokens_per_s"] / 2)
    assert (first["name"], second["name"]) == ("a", "b")


class Fake(torch.nn.Module):
    """A language model whose logits with a cache are off by `error`."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.error = error
        self.config = SimpleNamespace(max_position_embeddings=128)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        logits = torch.zeros(*input_ids.shape, 16)
        logits[..., 3] = self.scale + (self.error if past_key_values else 0.0)
        return SimpleNamespace(logits=logits, past_key_values="cache")


@pytest.mark.parametrize(("error", "passes"), [(0.0, True), (0.02, True), (0.2, False), (float("nan"), False)])
def test_nothing_is_timed_where_the_cache_changes_the_logits(
    error: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "load_model", lambda *_: (Fake(error), range(16)))
    if passes:
        sample = Runner("fake", CONFIG).round()
        assert sample["prefill"] > 0
        assert len(sample["steps"]) == CONFIG.new_tokens
        assert all(step > 0 for step in sample["steps"])
    else:
        with pytest.raises(RankwiseError, match="fake: logits with and without KV cache differ"):
            Runner("fake", CONFIG)


def test_a_prompt_of_one_token(model_folder: Callable[[str], Path]) -> None:
    """It is allowed, so it works."""
    sample = Runner(str(model_folder("llama")), BenchConfig(prompt=1, new_tokens=1, rounds=1)).round()
    assert sample["prefill"] > 0


def test_a_run_that_leaves_the_context_is_refused(model_folder: Callable[[str], Path]) -> None:
    """GPT-2 has no positions beyond its context; the reason must be told, and not guessed to be want of memory."""
    with pytest.raises(RankwiseError, match="128"):
        Runner(str(model_folder("gpt2")), BenchConfig(prompt=127, new_tokens=5, rounds=1)).round()


def test_the_same_tokens_are_fed_every_time(model_folder: Callable[[str], Path]) -> None:
    first, second = (Runner(str(model_folder("llama")), CONFIG) for _ in range(2))
    assert torch.equal(first.prompt, second.prompt)
    assert first.prompt.shape == (CONFIG.batch, CONFIG.prompt)
    assert int(first.prompt.max()) < 512
