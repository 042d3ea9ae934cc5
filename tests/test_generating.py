"""`rankwise generate`: which engine runs a model, and what does not fit."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

import rankwise
from rankwise.engine.runtime.params import SamplingParams
from rankwise.errors import RankwiseError
from rankwise.generating import Asked, generate

WHERE: dict[str, Any] = {"draft": None, "chat": False, "max_model_len": None, "device": "cpu", "dtype": "fp32"}
GREEDY = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture
def mamba(tokenizer: Any, tmp_path: Path) -> str:
    """A model without attention: neither the runtime nor continuous batching runs it."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    return str(tmp_path / "mamba")


def test_the_runtime_generates(model_folder: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = str(model_folder("llama"))
    wanted = rankwise.LLM(folder, dtype="fp32", device="cpu").generate("The river", GREEDY)[0].text
    generate(Asked(folder, "The river", GREEDY, **WHERE, as_json=False))
    assert capfd.readouterr().out == f"The river{wanted}\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_what_has_no_attention_runs_in_transformers(
    mamba: str, as_json: bool, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = rankwise.load_model(mamba, "fp32")
    ids = tokenizer("The river", return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0], skip_special_tokens=True)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING, "rankwise"):
        generate(Asked(mamba, "The river", GREEDY, **WHERE, as_json=as_json))
    assert caplog.records[-1].message.endswith("transformers' generate runs it")
    out = capfd.readouterr().out
    assert (continued := expected.removeprefix("The river"))
    assert json.loads(out)["completion"] == continued if as_json else out == f"{expected}\n"
    with pytest.raises(RankwiseError, match=r"^chat: "):
        generate(Asked(mamba, "The river", GREEDY, **WHERE | {"chat": True}, as_json=as_json))
    with pytest.raises(RankwiseError, match=r"^draft: "):
        generate(Asked(mamba, "The river", GREEDY, **WHERE | {"draft": mamba}, as_json=as_json))


def test_a_longer_context_is_to_be_had(
    model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "long"
    shutil.copytree(model_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 9000}))
    long = SamplingParams(max_tokens=8200, temperature=0)
    told = r"^prompt and max_tokens: \d+ tokens; allowed: up to 8192 \(--max-model-len: up to 9000\)$"
    with pytest.raises(RankwiseError, match=told):
        generate(Asked(str(folder), "The river", long, **WHERE, as_json=True))
    with pytest.raises(RankwiseError, match=r"^prompt and max_tokens: 81 tokens; allowed: up to 20$"):
        generate(
            Asked(str(folder), "a " * 40, replace(long, max_tokens=40), **WHERE | {"max_model_len": 20}, as_json=True)
        )
    generate(Asked(str(folder), "a " * 40, GREEDY, **WHERE | {"max_model_len": 9000}, as_json=True))
    assert 1 <= json.loads(capfd.readouterr().out.splitlines()[-1])["tokens"] <= 6
