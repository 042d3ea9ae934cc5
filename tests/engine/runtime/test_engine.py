"""The engine says what transformers says, token for token, whatever else is going on."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fourbit import random_layer
from scipy.stats import chisquare
from torch import nn

from rankwise.engine.layers import LowRankLinear, PivotLinear, build_layer
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.loader import convert
from rankwise.engine.runtime.params import SamplingParams
from rankwise.errors import RankwiseError
from rankwise.plan import LayerSpec
from rankwise.storage import Precision

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


WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4, "head_dim": 32}  # groups fit in it
STORED = [Precision("fp32"), Precision("int4", 32), Precision("nf4"), Precision("int8")]


def coded(model: Any) -> Any:
    """The same three kinds, each in 32, 8 and 4 bits; random codes, in place."""
    generator = torch.Generator().manual_seed(3)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in n]
    specs = []
    for at, (name, old) in enumerate(linears):
        kind, precision, (m, n) = ("lowrank", "pivot", "dense")[at % 3], STORED[at % 4], old.weight.shape
        specs.append(LayerSpec(kind, m, n, min(m, n) if kind == "dense" else 64, "fp32").stored_as(precision))
        model.set_submodule(name, random_layer(specs[-1], old.bias is not None, torch.float32, generator))
    assert len({(spec.kind, spec.precision) for spec in specs}) == 12
    return model


KINDS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "dense": (lambda model: model, {}),
    "mixed kinds": (compressed, {}),
    "mixed precisions": (coded, WIDE),
}


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
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(
    tiny: Callable[..., Any], family: str, kind: str, cancelling: Callable[..., None]
) -> None:
    """Under chunked prefill, preemption, shared prefixes and cancellation, within windows and beyond."""
    change, more = KINDS[kind]
    reference, model = (change(tiny(family, **more)) for _ in range(2))
    running, many = engine(model, blocks=90, most_length=110), prompts(64)
    long = replace(GREEDY, max_tokens=64)
    decoding, reading = (running.add(prompt, long) for prompt in (many[3], prompts(3, 80)[1][:40]))
    sequences = [running.add(prompt, long) for prompt in many[:12]]
    back = running.add(many[9], long)
    sequences += [running.add(prompt, long) for prompt in many[12:]]
    waiting = running.add(many[6], long)
    victims = {"waiting": waiting, "reading": reading, "decoding": decoding, "put back": back}
    cancelling(running, victims)
    assert all(follows(reference, s.prompt, s.output) and len(s.output) == 64 for s in sequences)
    assert all(s.output and follows(reference, s.prompt, s.output) for s in (decoding, back))
    some = min(sequences, key=lambda s: len(s.prompt))
    assert some.output[:NEW] == by_transformers(reference, some.prompt)
    assert sum(sequence.preempted for sequence in sequences) > 0
    assert sum(sequence.cached for sequence in sequences) > 0
    finish(running)


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_codes_in_bf16_are_as_near_to_fp32_as_transformers_is(tiny: Callable[..., Any], family: str) -> None:
    """In fp32 a CPU unpacks them; here they are multiplied as they are stored."""
    model, theirs, exact = (coded(tiny(family, **WIDE)).to(torch.bfloat16) for _ in range(3))
    running, exact = engine(model, blocks=90, most_length=110), exact.float()
    sequences = [running.add(prompt, replace(GREEDY, max_tokens=32, logprobs=0)) for prompt in prompts(16)]
    finish(running)
    errors = []
    for sequence in sequences:
        whole, start = torch.tensor([sequence.prompt + sequence.output]), len(sequence.prompt) - 1
        with torch.inference_mode():
            wanted, low = (m(whole).logits[0, start:-1].float().log_softmax(-1) for m in (exact, theirs))
        tokens = whole[0, start + 1 :, None]
        found = torch.tensor([each.chosen for each in sequence.logprobs])[:, None]
        errors.append([float((each - wanted.gather(1, tokens)).abs().sum()) for each in (found, low.gather(1, tokens))])
    ours, others = torch.tensor(errors).sum(0).tolist()
    assert 0 < ours <= 1.2 * others
    assert others < 0.1 * 16 * 32


@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("batch", [1, 2, 7, 32])
def test_the_size_of_the_batch_does_not_matter(tiny: Callable[..., Any], batch: int, tight: bool) -> None:
    """Nor does it where all start together and not all may stay; one alone never has to go."""
    reference, many = tiny("qwen3"), prompts(32)[:batch]
    most = sum(-(-len(prompt) // 4) for prompt in many) + batch
    blocks = max(most, -(-(len(many[0]) + NEW) // 4)) if tight else 1000
    running, sizes = engine(tiny("qwen3"), blocks=blocks, most_tokens=1024), []
    sequences = [running.add(prompt, GREEDY) for prompt in many]
    for _ in running.run():
        sizes.append(len(running.scheduler.running))
    finish(running)
    assert [sequence.output for sequence in sequences] == [by_transformers(reference, prompt) for prompt in many]
    assert max(sizes) == batch
    assert any(sequence.preempted for sequence in sequences) == (tight and batch > 1)


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


@torch.inference_mode()
def is_what_transformers_says(model: Any, reference: Any) -> None:
    """Tokens and their log-probabilities, for prompts of up to 60 tokens in chunks, some of which begin alike."""
    running, params = engine(model), replace(GREEDY, logprobs=0)
    sequences = [running.add(prompt, params) for prompt in [*prompts(4), *prompts(6, 60)]]
    finish(running)
    assert max(len(sequence.prompt) for sequence in sequences) > 40
    for sequence in sequences:
        logits = reference(torch.tensor([sequence.prompt + sequence.output])).logits[0, len(sequence.prompt) - 1 : -1]
        best, tokens = logits.log_softmax(-1).max(-1)
        assert sequence.output == tokens.tolist()
        assert [each.chosen for each in sequence.logprobs] == pytest.approx(best.tolist(), abs=1e-4)


SLIDING = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}
FAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, heads turned in part": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, windows": ("qwen2", SLIDING),
    "qwen3, windows and biases": ("qwen3", SLIDING | {"attention_bias": True}),
    "gemma3, far angles scaled": (
        "gemma3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": FAR}},
    ),
}


@pytest.mark.parametrize(("family", "settings"), SETTINGS.values(), ids=SETTINGS)
def test_what_a_config_may_ask_for(tiny: Callable[..., Any], family: str, settings: dict[str, Any]) -> None:
    is_what_transformers_says(tiny(family, **settings), tiny(family, **settings))


SHORT = {"original_max_position_embeddings": 32}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "llama3": SHORT | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": SHORT,
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_scalings(tiny: Callable[..., Any], family: str, kind: str) -> None:
    """Within the length that they scale and beyond."""
    rope = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0} | SCALINGS[kind]
    is_what_transformers_says(*(tiny(family, rope_parameters=rope) for _ in range(2)))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_are_refused(tiny: Callable[..., Any], kind: str) -> None:
    factors = {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0} | SHORT | factors
    with pytest.raises(RankwiseError, match=rf"rope_type:? {kind}; allowed: .*default, linear, llama3, yarn"):
        convert(tiny("llama", rope_parameters=rope), 64)
