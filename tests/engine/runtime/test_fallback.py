"""Architectures that our decoder does not cover, through transformers' continuous batching behind `rankwise.LLM`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from served import serve
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PhiConfig,
)

import rankwise
from rankwise.engine.runtime.params import SamplingParams
from rankwise.errors import RankwiseError

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
OTHERS: dict[str, Callable[[], Any]] = {
    "phi": lambda: PhiConfig(**SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16, sliding_window=16),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "llama with gelu": lambda: LlamaConfig(**SIZES, hidden_act="gelu"),
    "llama with dynamic angles": lambda: LlamaConfig(**SIZES, rope_parameters=DYNAMIC),
}
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8] * 20, list(range(10, 60)), [400, 3]]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], tokenizer: Any
) -> Callable[[str], Path]:
    """A tiny random model of a family that is in `tests/conftest.py` or here."""

    def make(family: str) -> Path:
        if family not in OTHERS:
            return model_folder(family)
        path = tmp_path_factory.mktemp("fallback") / family
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[family]())
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


def load(folder: Path, **options: Any) -> rankwise.LLM:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return rankwise.LLM(str(folder), **{"dtype": "fp32", "device": device, "max_model_len": 100, **options})


def expected(folder: Path, prompt: list[int], new: int = 12) -> list[int]:
    """By `generate`."""
    model, _ = rankwise.load_model(str(folder), "fp32")
    tensor = torch.tensor([prompt])
    mask = torch.ones_like(tensor)
    model.generation_config.eos_token_id = None  # nothing ends early, and nothing is forbidden
    out = model.generate(tensor, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=1)
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.fixture(scope="module")
def llm(folder: Callable[[str], Path]) -> rankwise.LLM:
    return load(folder("gpt2"), kv_tokens=800)


def free(llm: rankwise.LLM) -> bool:
    return llm.engine.pool.available() == llm.engine.pool.count


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", *OTHERS])
def test_greedy_tokens_are_those_of_generate(
    family: str, folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = folder(family)
    with caplog.at_level(logging.WARNING, "rankwise"):
        llm = load(path, max_batched_tokens=32)  # so that the longest prompt comes in chunks
    assert llm.backend == "transformers"
    assert [record.message for record in caplog.records if record.name == "rankwise"] == [
        f"{llm.model_config.model_type}: not an architecture of the runtime; transformers' continuous batching runs it"
    ]
    done = llm.generate(PROMPTS, GREEDY)
    assert [c.tokens for c in done] == [expected(path, prompt) for prompt in PROMPTS]
    assert {c.finish_reason for c in done} == {"length"}
    assert free(llm)


def test_our_own_families_do_not_come_here(folder: Callable[[str], Path]) -> None:
    assert load(folder("llama")).backend == "rankwise"


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_compressed_checkpoints(family: str, folder: Callable[[str], Path], tokenizer: Any, tmp_path: Path) -> None:
    model, _ = rankwise.load_model(str(folder(family)))
    windows = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))
    plan = rankwise.allocate(model, windows, rankwise.Global(ratio=0.6, rank_multiple=1), device="cpu")
    path = rankwise.save(rankwise.compress(model, plan), tokenizer, plan, tmp_path / "small")
    llm = load(path)
    assert llm.backend == "transformers"
    assert [c.tokens for c in llm.generate(PROMPTS, GREEDY)] == [expected(path, prompt) for prompt in PROMPTS]


def test_a_tight_cache_changes_no_token(folder: Callable[[str], Path]) -> None:
    """Room for two of the four: some lose their place and are computed again."""
    llm = load(folder("gpt2"), kv_tokens=128, max_sequences=4)
    assert [c.tokens for c in llm.generate(PROMPTS, GREEDY)] == [expected(folder("gpt2"), p) for p in PROMPTS]
    assert free(llm)


def test_a_prefix_is_computed_once(llm: rankwise.LLM) -> None:
    prompt = [77, *range(60, 100)]
    first, second = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)  # whole blocks of 16
    assert first.tokens == second.tokens
    off = load(Path(llm.model_config.name_or_path), prefix_caching=False)
    assert [off.generate(prompt, GREEDY)[0].cached_tokens for _ in range(2)] == [0, 0]


def test_a_stream_is_the_completion_in_pieces_and_closing_it_cancels(llm: rankwise.LLM) -> None:
    pieces = list(llm.stream("The module", GREEDY))
    assert "".join(pieces) == llm.generate("The module", GREEDY)[0].text
    assert len(pieces) > 1
    stream = llm.stream("The module", GREEDY)
    next(stream)
    assert not free(llm)
    stream.close()
    assert free(llm)
    assert not llm.engine.busy


def test_a_stop_text_ends_one_request_and_not_its_neighbour(llm: rankwise.LLM) -> None:
    said = {prompt: llm.generate(prompt, GREEDY)[0].text for prompt in ("def f(x):", "The module", "An", "river")}
    prompt, whole = next((prompt, text) for prompt, text in said.items() if len(text) > 2)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop=stop)
    stopped, other = llm.generate([prompt, prompt], [params, GREEDY])
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert (other.text, other.finish_reason) == (whole, "length")
    assert free(llm)


def test_each_request_has_its_own_length_and_ending(llm: rankwise.LLM) -> None:
    tokens = llm.generate([5, 6, 7], GREEDY)[0].tokens
    short = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    ended = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop_token_ids=[tokens[3]])
    one, two, three = llm.generate([[5, 6, 7]] * 3, [short, ended, GREEDY])
    assert one.tokens == tokens[:2]
    assert (two.tokens, two.finish_reason) == (tokens[: tokens.index(tokens[3]) + 1], "stop")
    assert three.tokens == tokens


def test_sampling_is_ours(folder: Callable[[str], Path], llm: rankwise.LLM) -> None:
    """A seed gives the same tokens as plain passes through the model with our sampler, whatever runs beside it."""
    params = SamplingParams(
        max_tokens=8, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=0.3, ignore_eos=True, logprobs=3, seed=7,
    )  # fmt: skip
    alone = llm.generate([5, 6, 7], params)[0]
    beside = llm.generate([[9] * 9, [5, 6, 7], [8, 8]], [GREEDY, params, params])[1]
    assert alone.tokens == beside.tokens == by_hand(folder("gpt2"), [5, 6, 7], params)
    assert alone.tokens != llm.generate([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True, seed=8))[0].tokens
    assert alone.logprobs is not None
    assert [len(entry.top) for entry in alone.logprobs] == [3] * 8


def by_hand(folder: Path, prompt: list[int], params: SamplingParams) -> list[int]:
    from rankwise.engine.runtime.acceptance import choose
    from rankwise.engine.runtime.sequence import Sequence

    model, _ = rankwise.load_model(str(folder), "fp32")
    sequence = Sequence(list(prompt), params, torch.Generator().manual_seed(params.seed or 0))
    with torch.no_grad():
        for _ in range(params.max_tokens):
            logits = model(torch.tensor([sequence.tokens()]), use_cache=False).logits[:, -1].float()
            [[(token, _)]] = choose(logits, [sequence])
            sequence.output.append(token)
    return sequence.output


def test_a_bad_prompt_is_refused_and_leaves_nothing_behind(llm: rankwise.LLM) -> None:
    with pytest.raises(RankwiseError, match="prompt: 0 tokens; allowed: 1 to 99"):
        llm.generate(["The", []], GREEDY)
    assert not llm.engine.busy
    assert free(llm)


def test_chat_needs_a_template(llm: rankwise.LLM) -> None:
    with pytest.raises(RankwiseError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4), "its logits are off by"),
        (MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2), "'MambaConfig' object has no attribute"),
    ],
    ids=["bloom", "mamba"],
)
def test_what_transformers_cannot_batch_is_refused(config: Any, reason: str, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(RankwiseError, match="neither the runtime nor transformers' continuous batching") as raised:
        load(tmp_path / "model")
    assert raised.value.field == "model_type"
    assert f"{config.model_type} ({reason}" in str(raised.value)


def test_it_is_served(folder: Callable[[str], Path], llm: rankwise.LLM) -> None:
    """By the server's own loop: a completion, a stream, and one that is given up."""
    with serve(folder("gpt2"), "--max-model-len", "100", "--kv-tokens", "800") as served:
        body = {"prompt": "The module", "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
        client = served.openai().completions
        whole = llm.generate("The module", GREEDY)[0]
        done = client.create(model=served.model, **body)
        assert (done.choices[0].text, done.choices[0].finish_reason) == (whole.text, "length")
        assert "".join(e.choices[0].text for e in client.create(model=served.model, **body, stream=True)) == whole.text
        stream = client.create(model=served.model, **(body | {"max_tokens": 90}), stream=True)
        next(iter(stream))
        stream.close()
        served.wait(served.empty)


def test_a_draft_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(RankwiseError, match=r"^draft: .*left out: gpt2 runs through transformers"):
        load(folder("gpt2"), draft=str(folder("gpt2")))


def test_angles_that_depend_on_the_length_are_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from shutil import copytree

    from transformers import AutoConfig

    copytree(folder("phi3"), tmp_path / "long")
    config = AutoConfig.from_pretrained(tmp_path / "long")
    factors = {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}
    original = {"original_max_position_embeddings": 64}
    config.original_max_position_embeddings = 64
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        **factors,
        **original,
    }
    config.save_pretrained(tmp_path / "long")
    with pytest.raises(RankwiseError, match="max_model_len: 100; rope_type longrope: allowed: up to 64"):
        load(tmp_path / "long")
    assert load(tmp_path / "long", max_model_len=64).backend == "transformers"
    assert load(tmp_path / "long", max_model_len=None).engine.scheduler.most_length == 64
