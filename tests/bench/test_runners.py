"""Contestants in this process: what they time, and that nonsense is not timed."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from rankwise.bench import BenchConfig, Contestant, Load
from rankwise.bench import generate as generate_module
from rankwise.bench.arrivals import Request
from rankwise.bench.gate import require_cache
from rankwise.bench.runners import Runner, load_runner
from rankwise.errors import RankwiseError

CONFIG = BenchConfig(prompts=(8,), new_tokens=5, batches=(3,), device="cpu", load=Load(1.0, mix=((8, 5),)))
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [9] * 8, [4, 3] * 4]


@pytest.fixture(scope="module", params=["rankwise llama", "transformers llama", "rankwise gpt2", "transformers gpt2"])
def runner(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Runner:
    engine, family = request.param.split()
    return load_runner(Contestant(engine, str(model_folder(family))), CONFIG)


def test_times_of_a_batch(runner: Runner) -> None:
    runner.gate()
    start = time.perf_counter()
    stamps = runner.batch(PROMPTS, 5)
    whole = time.perf_counter() - start
    assert [len(times) for times in stamps] == [5, 5, 5]
    for times in stamps:
        assert times[0] > 0
        assert times == sorted(set(times))
        assert times[-1] <= whole


def test_requests_wait_for_their_arrival_and_get_what_they_ask_for(runner: Runner) -> None:
    trace = [Request(0.0, PROMPTS[0], 5), Request(0.0, PROMPTS[1][:3], 2), Request(0.3, PROMPTS[2], 4)]
    stamps = runner.serve(trace)
    assert [len(times) for times in stamps] == [5, 2, 4]
    assert stamps[2][0] > 0.3


@pytest.mark.parametrize("engine", ["rankwise", "transformers"])
def test_the_end_of_sequence_ends_nothing(engine: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Every token means the end here, and yet as many come as were asked for."""
    copytree(model_folder("llama"), tmp_path / "model")
    GenerationConfig(eos_token_id=list(range(512))).save_pretrained(tmp_path / "model")
    runner = load_runner(Contestant(engine, str(tmp_path / "model")), CONFIG)
    assert [len(times) for times in runner.batch(PROMPTS, 5)] == [5, 5, 5]


@pytest.mark.parametrize("engine", ["rankwise", "transformers"])
def test_a_run_that_leaves_the_context_is_refused(engine: str, model_folder: Callable[[str], Path]) -> None:
    config = BenchConfig(prompts=(127,), new_tokens=5, device="cpu")
    with pytest.raises(RankwiseError, match=r"^prompt and new_tokens: 132; allowed: .*128"):
        load_runner(Contestant(engine, str(model_folder("gpt2"))), config)


class Fake(torch.nn.Module):
    """A language model whose logits with a cache are off by `error`."""

    dtype = torch.float32

    def __init__(self, error: float) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 4)
        self.error = error
        sizes = {"num_attention_heads": 1, "num_hidden_layers": 1, "hidden_size": 4, "model_type": "fake"}
        self.config = SimpleNamespace(max_position_embeddings=128, **sizes)
        self.config.get_text_config = lambda: self.config
        self.generation_config = GenerationConfig()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    get_output_embeddings = get_input_embeddings

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        logits = torch.zeros(*input_ids.shape, 16)
        logits[..., 3] = 1 + (self.error if past_key_values else 0.0)
        return SimpleNamespace(logits=logits, past_key_values="cache")


@pytest.mark.parametrize(("error", "passes"), [(0.0, True), (0.02, True), (0.2, False), (float("nan"), False)])
def test_nothing_is_timed_where_the_cache_changes_the_logits(
    error: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_module, "load_model", lambda *_: (Fake(error), range(16)))
    runner = load_runner(Contestant("transformers", "fake"), CONFIG)
    if passes:
        runner.gate()
    else:
        with pytest.raises(RankwiseError, match="transformers: fake: logits with and without KV cache differ"):
            runner.gate()


def top(shift: float, length: list[int]) -> Callable[[list[int], int], tuple[list[int], dict[int, float]]]:
    """An engine that says log-probabilities, off by `shift` after decoding."""

    def of(prompt: Sequence[int], count: int) -> tuple[list[int], dict[int, float]]:
        length.append(len(prompt) + count)
        known = {token: -1.0 - token for token in range(5)}
        return [1] * count, {token: value * (1 + shift * (count > 1)) for token, value in known.items()}

    return of


@pytest.mark.parametrize(("shift", "passes"), [(0.0, True), (0.02, True), (0.2, False), (float("nan"), False)])
@pytest.mark.parametrize("longest", [3, 5, 100])
def test_engines_that_tell_probabilities_are_checked_too(shift: float, passes: bool, longest: int) -> None:
    lengths: list[int] = []
    if passes:
        require_cache("x", top(shift, lengths), 16, longest)
    else:
        with pytest.raises(RankwiseError, match="model: x: logits with and without KV cache differ"):
            require_cache("x", top(shift, lengths), 16, longest)
    assert max(lengths) <= longest


def test_other_likely_tokens_are_no_pass() -> None:
    def of(prompt: Sequence[int], count: int) -> tuple[list[int], dict[int, float]]:
        return [1] * count, {token + 8 * (count > 1): -1.0 for token in range(8)}

    with pytest.raises(RankwiseError, match="other tokens are likely"):
        require_cache("x", of, 16, 100)
