"""The engine says what transformers says, token for token, whatever else is going on."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import LlamaForCausalLM

from rankwise.engine.layers import LowRankLinear, PivotLinear, build_layer
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.loader import convert
from rankwise.engine.runtime.params import SamplingParams
from rankwise.errors import RankwiseError
from rankwise.plan import LayerSpec

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]
NEW = 16
GREEDY = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    """Random ids of random lengths, some of which begin alike."""
    rng = random.Random(0)
    common = [rng.randrange(2, 500) for _ in range(longest // 2)]
    made = [[rng.randrange(2, 500) for _ in range(rng.randrange(1, longest))] for _ in range(count)]
    return [common + prompt[: longest // 2] if at % 3 == 0 else prompt for at, prompt in enumerate(made)]


def by_transformers(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """Greedy."""
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 1, "do_sample": False} | options
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@torch.inference_mode()
def follows(model: Any, prompt: list[int], output: list[int]) -> bool:
    """Whether every token is transformers' likeliest one after those before it; then greedy decoding says the same."""
    logits = model(torch.tensor([prompt + output])).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output


def compressed(model: Any) -> Any:
    """Every linear of the blocks becomes dense, lowrank or pivot in turn, with random numbers; in place."""
    generator = torch.Generator().manual_seed(3)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in n]
    for at, (name, old) in enumerate(linears):
        kind = ("lowrank", "pivot", "dense")[at % 3]
        if kind == "dense":
            continue
        rank = 4 + at % 5
        layer = build_layer(
            LayerSpec(kind, *old.weight.shape, rank, "fp32"), old.bias is not None, torch.float32, "cpu"
        )
        for part in layer.parameters():
            part.copy_(torch.randn(part.shape, generator=generator) * part.shape[-1] ** -0.5)
        if isinstance(layer, PivotLinear):
            layer.pivot_index.copy_(torch.randperm(len(layer.pivot_index), generator=generator).int())
        model.set_submodule(name, layer)
    assert {type(m) for m in model.modules()} >= {LowRankLinear, PivotLinear}
    return model


def engine(model: Any, **options: Any) -> Engine:
    """Small blocks, small steps, room for a few sequences: everything that can happen does."""
    return Engine(
        convert(model, 128),
        EngineConfig(**({"blocks": 30, "block_size": 4, "most_tokens": 16, "most_length": 80} | options)),
    )


def finish(running: Engine) -> None:
    for _ in running.run():
        pass
    assert running.pool.available() == running.pool.count
    assert not any(running.pool.holders)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixed", [False, True], ids=["dense", "mixed kinds"])
def test_greedy_tokens_are_those_of_transformers(tiny: Callable[..., Any], family: str, mixed: bool) -> None:
    """Under chunked prefill, preemption, shared prefixes and cancellation."""
    reference, model = (compressed(tiny(family)) if mixed else tiny(family) for _ in range(2))
    running, many = engine(model, blocks=90, most_length=110), prompts(64)
    long = replace(GREEDY, max_tokens=64)
    sequences = [running.add(prompt, long) for prompt in many]
    victims = [running.add(prompt, long) for prompt in prompts(4)]
    for number, _ in enumerate(running.run()):
        if number in (2, 9, 30):
            running.cancel(victims[number % 4])
    assert all(follows(reference, s.prompt, s.output) and len(s.output) == 64 for s in sequences)
    some = min(sequences, key=lambda s: len(s.prompt))
    assert some.output[:NEW] == by_transformers(reference, some.prompt)
    assert sum(sequence.preempted for sequence in sequences) > 0
    assert sum(sequence.cached for sequence in sequences) > 0
    assert {victim.finish_reason for victim in victims} == {"cancelled", "length"}
    finish(running)


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
def test_the_size_of_the_batch_does_not_matter(tiny: Callable[..., Any], batch: int) -> None:
    reference, many = tiny("qwen3"), prompts(32)[:batch]
    running = engine(tiny("qwen3"), blocks=1000, most_tokens=512)
    sequences = [running.add(prompt, GREEDY) for prompt in many]
    finish(running)
    assert [sequence.output for sequence in sequences] == [by_transformers(reference, prompt) for prompt in many]


def test_requests_that_come_while_others_run(tiny: Callable[..., Any]) -> None:
    reference, running, added = tiny("llama"), engine(tiny("llama")), []
    for prompt in prompts(6):
        added.append(running.add(prompt, GREEDY))
        running.step()
    finish(running)
    assert [sequence.output for sequence in added] == [by_transformers(reference, prompt) for prompt in prompts(6)]


def test_a_prefix_is_computed_once(tiny: Callable[..., Any]) -> None:
    prompt = prompts(1)[0][:17]
    outputs = {}
    for share in (True, False):
        running = engine(tiny("llama"), share=share)
        first = running.add(prompt, GREEDY)
        finish(running)
        second = running.add(prompt, GREEDY)
        finish(running)
        assert (first.cached, second.cached) == (0, 16 if share else 0)
        outputs[share] = first.output, second.output
    assert outputs[True] == outputs[False]


def test_it_stops_where_it_should(tiny: Callable[..., Any]) -> None:
    prompt = prompts(1)[0]
    plain = engine(tiny("llama"))
    free = plain.add(prompt, GREEDY)
    finish(plain)
    third = free.output[2]
    running = Engine(convert(tiny("llama"), 128), EngineConfig(blocks=64, most_length=len(prompt) + 9), eos=[third])
    by_eos = running.add(prompt, SamplingParams(max_tokens=NEW, temperature=0))
    by_token = running.add(
        prompt, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, stop_token_ids=[third])
    )
    by_length = running.add(prompt, GREEDY)
    finish(running)
    stop = free.output.index(third) + 1
    assert [by_eos.output, by_token.output] == [free.output[:stop]] * 2
    assert (by_eos.finish_reason, by_token.finish_reason, by_length.finish_reason) == ("stop", "stop", "length")
    assert by_length.output == free.output[:9]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(tiny: Callable[..., Any], penalty: float) -> None:
    running = engine(tiny("llama"))
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, repetition_penalty=penalty)
    sequences = [running.add(prompt, params) for prompt in prompts(3)]
    finish(running)
    reference = tiny("llama")
    wanted = [by_transformers(reference, prompt, repetition_penalty=penalty) for prompt in prompts(3)]
    assert [sequence.output for sequence in sequences] == wanted


def test_presence_and_frequency_penalties_keep_tokens_from_coming_again(tiny: Callable[..., Any]) -> None:
    running, params = (
        engine(tiny("llama"), blocks=200, most_length=120),
        {"temperature": 0, "max_tokens": 60, "ignore_eos": True},
    )
    plain, present, frequent = (
        running.add(prompts(1)[0], SamplingParams(**params, **more))
        for more in ({}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0})
    )
    finish(running)
    assert len(set(plain.output)) < min(len(set(present.output)), len(set(frequent.output)))


def test_a_seed_fixes_a_requests_tokens_whoever_else_is_there(tiny: Callable[..., Any]) -> None:
    params = SamplingParams(max_tokens=NEW, temperature=1.3, top_k=50, top_p=0.95, seed=11, ignore_eos=True)
    alone = engine(tiny("llama"))
    one = alone.add(prompts(1)[0], params)
    finish(alone)
    crowd = engine(tiny("llama"))
    others = [crowd.add(prompt, SamplingParams(max_tokens=NEW, ignore_eos=True)) for prompt in prompts(6)]
    same = crowd.add(prompts(1)[0], params)
    finish(crowd)
    assert same.output == one.output
    assert others[0].output != one.output


def test_samples_follow_the_models_distribution(tiny: Callable[..., Any]) -> None:
    reference, prompt, draws = tiny("llama"), prompts(1)[0], 3000
    running = engine(tiny("llama"), blocks=400, most_tokens=4096, most_sequences=3000)
    sequences = [running.add(prompt[:3], SamplingParams(max_tokens=1, temperature=0.7, seed=n)) for n in range(draws)]
    finish(running)
    with torch.no_grad():
        p = (reference(torch.tensor([prompt[:3]])).logits[0, -1].double() / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor([s.output[0] for s in sequences]), minlength=len(p))
    likely = p * draws >= 5
    observed = [*counts[likely].tolist(), int(counts[~likely].sum())]
    expected = [*(p[likely] * draws).tolist(), float(p[~likely].sum() * draws)]
    assert chisquare(observed, expected).pvalue > 1e-3


def test_logprobs_are_those_of_the_models_logits(tiny: Callable[..., Any]) -> None:
    running, prompt = engine(tiny("qwen2")), prompts(1)[0]
    sequence = running.add(prompt, SamplingParams(max_tokens=5, temperature=0, logprobs=3, ignore_eos=True))
    quiet = running.add(prompt, GREEDY)
    finish(running)
    with torch.no_grad():
        logits = tiny("qwen2")(torch.tensor([prompt + sequence.output])).logits[0].log_softmax(-1)
    assert not quiet.logprobs
    for place, found in enumerate(sequence.logprobs):
        row = logits[len(prompt) - 1 + place]
        assert found.chosen == pytest.approx(float(row[sequence.output[place]]), abs=1e-4)
        assert list(found.top) == row.topk(3).indices.tolist()
        assert list(found.top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("length", [0, 80, 200])
def test_a_prompt_that_cannot_be_answered_is_refused(tiny: Callable[..., Any], length: int) -> None:
    running = engine(tiny("llama"))
    with pytest.raises(RankwiseError, match=f"prompt: {length} tokens; allowed: 1 to 79"):
        running.add([5] * length, GREEDY)
    assert not running.busy


def test_other_families_are_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(RankwiseError, match="model_type: gpt2; allowed: llama, mistral"):
        convert(tiny("gpt2"), 64)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rotary_scalings(tiny: Callable[..., Any], kind: str) -> None:
    more = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}
    config = tiny("llama").config
    config.rope_parameters = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0} | more.get(kind, {})
    torch.manual_seed(0)
    reference = LlamaForCausalLM(config).eval()
    for parameter in reference.parameters():
        parameter.data *= 4
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(reference.state_dict())
    running = engine(model)
    sequences = [running.add(prompt, GREEDY) for prompt in prompts(3)]
    finish(running)
    assert [s.output for s in sequences] == [by_transformers(reference, prompt) for prompt in prompts(3)]


def test_angles_that_depend_on_the_length_are_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(RankwiseError, match="rope_type: dynamic; allowed: default"):
        convert(model, 64)
