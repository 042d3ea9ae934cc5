"""What is asked for: shapes, arrivals, contestants."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.bench import BenchConfig, Load, line_up
from rankwise.bench.arrivals import cut_prompts, make_prompts, make_trace
from rankwise.errors import RankwiseError


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompts": (0,)}, "prompt"),
        ({"prompts": ()}, "prompt"),
        ({"batches": (1, -1)}, "batch"),
        ({"batches": (True,)}, "batch"),
        ({"new_tokens": 1}, "new_tokens"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": 1.5}, "rounds"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RankwiseError, match=f"^{named}: .*allowed: "):
        BenchConfig(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rate": 0}, "load"),
        ({"rate": float("inf")}, "load"),
        ({"rate": 1, "requests": 1}, "requests"),
        ({"rate": 1, "mix": ()}, "mix"),
        ({"rate": 1, "mix": ((0, 4),)}, "mix"),
        ({"rate": 1, "mix": ((4, 1),)}, "mix"),
        ({"rate": 1, "ttft_limit": -1}, "ttft_limit"),
        ({"rate": 1, "seed": -1}, "seed"),
    ],
)
def test_a_load_is_checked(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RankwiseError, match=f"^{named}: .*allowed: "):
        Load(**options)


def test_sizes_hold_what_is_asked() -> None:
    config = BenchConfig((8, 16, 8), 4, (2, 1), load=Load(1.0, mix=((30, 10), (5, 50))))
    assert config.shapes == [(2, 8), (2, 16), (1, 8), (1, 16)]
    assert config.longest == 55
    assert BenchConfig((8, 16), 4).longest == 20
    assert config.cache_tokens >= 8 * 55


def test_a_trace_is_seeded_and_poisson() -> None:
    load = Load(rate=50.0, requests=4000, mix=((3, 5), (7, 2)), seed=1)
    trace = make_trace(load, vocabulary=100, round_=0)
    gaps = np.diff([request.arrival for request in trace])
    assert trace[0].arrival == 0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)  # of an exponential distribution the same as its mean
    shapes = [(len(request.prompt), request.output) for request in trace]
    assert 0.4 < shapes.count((3, 5)) / len(shapes) < 0.6
    assert set(shapes) == {(3, 5), (7, 2)}
    assert max(max(request.prompt) for request in trace) == 99
    assert trace == make_trace(load, 100, 0)
    assert trace != make_trace(load, 100, 1)
    assert trace != make_trace(Load(50.0, 4000, load.mix, seed=2), 100, 0)


def test_prompts_are_the_same_for_all_and_others_in_each_round() -> None:
    prompts = make_prompts(3, 8, 100, 0)
    assert [len(prompt) for prompt in prompts] == [8, 8, 8]
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert prompts == make_prompts(3, 8, 100, 0)
    assert prompts != make_prompts(3, 8, 100, 1)


def test_prompts_are_cut_from_a_text_round_after_round() -> None:
    ids = list(range(100, 150))
    assert cut_prompts(ids, 2, 8, -1) == [ids[:8], ids[8:16]]
    assert cut_prompts(ids, 2, 8, 0) == [ids[16:24], ids[24:32]]
    for round_ in range(20):  # after the end it goes on from the start
        first, second = cut_prompts(ids, 2, 25, round_)
        assert first != second
        assert [len(first), len(second)] == [25, 25]
    with pytest.raises(RankwiseError, match=r"^text: 50 tokens; 7 prompts of 8 need 56"):
        cut_prompts(ids, 7, 8, 0)


def test_every_engine_runs_every_model_once() -> None:
    found = line_up(["a", "b", "a"], ["rankwise", "transformers", "rankwise"])
    assert [str(contestant) for contestant in found] == [
        "rankwise: a",
        "transformers: a",
        "rankwise: b",
        "transformers: b",
    ]


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(RankwiseError, match=r"^engine: onnx; allowed: rankwise, transformers, bitsandbytes, vllm"):
        line_up(["a"], ["onnx"])


@pytest.mark.parametrize("engine", ["bitsandbytes", "vllm"])
def test_an_engine_that_is_not_installed_is_refused(engine: str) -> None:
    if find_spec(engine):
        pytest.skip("installed")
    with pytest.raises(RankwiseError, match=f"^engine: {engine} \\(not installed\\); pip install {engine}"):
        line_up(["a"], [engine])


def test_engines_for_dense_models_pass_over_compressed_ones(
    monkeypatch: pytest.MonkeyPatch, model_folder: Callable[[str], Path]
) -> None:
    from rankwise.bench import lineup

    monkeypatch.setattr(lineup, "find_spec", lambda name: name)
    monkeypatch.setattr(lineup, "is_rankwise", lambda folder: "llama" in str(folder))
    monkeypatch.setattr(lineup, "_require_vllm", lambda device: None)
    dense, small = str(model_folder("qwen2")), str(model_folder("llama"))
    assert [c.model for c in line_up([small, dense], ["vllm"])] == [small, dense]
    assert [c.model for c in line_up([small, dense], ["bitsandbytes"])] == [dense]
    with pytest.raises(RankwiseError, match=r"^engine: bitsandbytes \(it opens dense models only\)"):
        line_up([small], ["bitsandbytes"])
