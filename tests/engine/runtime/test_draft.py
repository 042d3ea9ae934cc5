"""A draft from where people ask for one: `rankwise.LLM`, `rankwise generate`, `rankwise serve`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from served import serve
from typer.testing import CliRunner

import rankwise
from rankwise.cli import app
from rankwise.engine.runtime.params import SamplingParams
from rankwise.errors import RankwiseError

NEW = 24
GREEDY = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
WINDOWS = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def small(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """The tiny Llama, compressed by rankwise, as a folder."""
    model, _ = rankwise.zoo.load_model(str(model_folder("llama")))
    plan = rankwise.allocate(model, WINDOWS, rankwise.Global(ratio=0.7, rank_multiple=1))
    folder = tmp_path_factory.mktemp("small") / "llama"
    rankwise.save(rankwise.compress(model, plan), tokenizer, plan, folder)
    return str(folder)


SIZES: dict[str, Any] = {"max_model_len": 100, "kv_tokens": 800, "dtype": "fp32", "device": "cpu"}


def test_llm_with_its_own_compressed_checkpoint(model_folder: Callable[[str], Path], small: str) -> None:
    dense = str(model_folder("llama"))
    plain, fast = rankwise.LLM(dense, **SIZES), rankwise.LLM(dense, draft=small, draft_tokens=3, **SIZES)
    texts = ["The module", "An exception is", "def f(x):", "A list of all the names"]
    wanted, found = plain.generate(texts, GREEDY), fast.generate(texts, GREEDY)
    assert [(c.tokens, c.text, c.finish_reason) for c in found] == [(c.tokens, c.text, c.finish_reason) for c in wanted]
    assert plain.speculation is None
    tally = fast.speculation
    assert tally is not None
    assert 0 < tally.accepted < tally.drafted
    assert tally.tokens_per_check == pytest.approx(1 + tally.accepted / tally.checks)
    assert "".join(fast.stream(texts[0], GREEDY)) == wanted[0].text
    assert fast.plan.blocks * fast.plan.block_bytes == fast.engine.cache_bytes == 2 * plain.engine.cache_bytes
    assert fast.plan.workspace >= 2 * plain.plan.workspace


def test_a_stop_text_within_what_was_accepted(model_folder: Callable[[str], Path]) -> None:
    dense = str(model_folder("llama"))
    plain, fast = rankwise.LLM(dense, **SIZES), rankwise.LLM(dense, draft=dense, **SIZES)
    whole = plain.generate("The module", GREEDY)[0].text
    for start in range(0, len(whole) - 3, 5):
        stop = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, stop=whole[start : start + 2], logprobs=0)
        one, other = plain.generate("The module", stop)[0], fast.generate("The module", stop)[0]
        assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
        assert len(other.logprobs or ()) == len(other.tokens)
        assert "".join(fast.stream("The module", stop)) == one.text
    assert fast.engine.pool.available() == fast.engine.pool.count


def test_a_draft_with_other_tokens_is_refused(
    model_folder: Callable[[str], Path], tiny: Make, tokenizer: Any, tmp_path: Path
) -> None:
    dense = str(model_folder("llama"))
    model = tiny("llama")
    model.resize_token_embeddings(520)
    model.save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(RankwiseError, match=r"^draft: .*larger \(a vocabulary of 520\); the model's has 512$"):
        rankwise.LLM(dense, draft=str(tmp_path / "larger"), **SIZES)
    tiny("llama").save_pretrained(tmp_path / "swapped")
    tokenizer.save_pretrained(tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    file.write_text(file.read_text().replace('"</s>"', '"<end>"'))
    with pytest.raises(RankwiseError, match=r"^draft: .*swapped \(another tokenizer\); "):
        rankwise.LLM(dense, draft=str(tmp_path / "swapped"), **SIZES)
    short = tiny("llama")
    short.config.max_position_embeddings = 99
    short.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(RankwiseError, match=r"^draft: .*short \(made for 99 tokens\); at least max_model_len, 100$"):
        rankwise.LLM(dense, draft=str(tmp_path / "short"), **SIZES)
    with pytest.raises(RankwiseError, match=r"^draft: .*none \(no such folder\)"):
        rankwise.LLM(dense, draft=str(tmp_path / "none"), **SIZES)
    for name in ("draft_tokens", "draft_sequences"):
        with pytest.raises(RankwiseError, match=f"^{name}: 0; "):
            rankwise.LLM(dense, draft=dense, **SIZES, **{name: 0})


def test_the_command_with_a_draft(model_folder: Callable[[str], Path], small: str) -> None:
    dense = str(model_folder("llama"))
    command = ["generate", dense, "The river", "--max-tokens", "9", "--dtype", "fp32", "--device", "cpu"]
    done = [CliRunner().invoke(app, [*command, *more]) for more in ([], ["--draft", small])]
    assert [run.exit_code for run in done] == [0, 0]
    broken = "\ufffd\n"  # half a character at the end, which the runtime does not show
    assert done[1].stdout.rstrip(broken) == done[0].stdout.rstrip(broken)
    facts = [
        json.loads(CliRunner().invoke(app, [*command, "--json", *more]).stdout) for more in ([], ["--draft", small])
    ]
    assert 0 < facts[1].pop("acceptance") < 1
    assert facts[1]["completion"].rstrip(broken) == facts[0]["completion"].rstrip(broken)
    assert [fact["tokens"] for fact in facts] == [9, 9]
    wrong = CliRunner().invoke(app, [*command, "--draft", small, "--max-tokens", "126"])
    assert str(wrong.exception) == "prompt and max_tokens: 129 tokens; allowed: up to 128"


def test_a_server_with_a_draft(model_folder: Callable[[str], Path]) -> None:
    dense = str(model_folder("llama"))
    wanted = rankwise.LLM(dense, **SIZES).generate("The module", GREEDY)[0]
    stop = wanted.text[8:10]
    cut = rankwise.LLM(dense, **SIZES).generate(
        "The module", SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, stop=stop)
    )[0]
    options = ["--draft", dense, "--draft-tokens", "3", "--max-model-len", "100", "--kv-tokens", "800"]
    with serve(Path(dense), *options) as server:
        ask = {"prompt": "The module", "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        whole = server.post(**ask).json()
        assert whole["choices"][0]["text"] == wanted.text
        assert whole["usage"]["completion_tokens"] == NEW
        stopped = server.post(**ask, stop=stop, logprobs=1).json()
        assert stopped["choices"][0]["text"] == cut.text
        assert stopped["usage"]["completion_tokens"] == len(cut.tokens)
        assert "".join(stopped["choices"][0]["logprobs"]["tokens"]).startswith(cut.text)
        events = [
            e.choices[0].text
            for e in server.openai().completions.create(
                model=dense,
                stream=True,
                extra_body={"ignore_eos": True},
                prompt="The module",
                max_tokens=NEW,
                temperature=0,
            )
        ]
        assert "".join(events) == wanted.text
        server.wait(server.empty)
        assert server.metric("draft_tokens_total") == server.metric("accepted_draft_tokens_total") > 0
