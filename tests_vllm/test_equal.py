"""64 prompts, 32 greedy tokens each, in fp32: vLLM says what transformers says, token for token."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests_vllm.conftest import answers, opened
from tests_vllm.models import FAMILIES, MIXTURES, text_prompts


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind(family: str, mixture: str, checkpoint: Callable[..., Path], said: Callable[..., Any]) -> None:
    folder = checkpoint(family, mixture)
    asked, wanted = said(folder)
    with opened(folder) as llm:
        assert answers(llm, asked) == wanted
    assert len({tuple(answer) for answer in wanted}) > 50  # it does not say the same to everything


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family: str, checkpoint: Callable[..., Path], said: Callable[..., Any]) -> None:
    folder = checkpoint(family, "mixed")
    asked, wanted = said(folder)
    with opened(folder, enforce_eager=False) as llm:
        assert answers(llm, asked) == wanted


def test_fused_on_disk(checkpoint: Callable[..., Path], said: Callable[..., Any]) -> None:
    folder = checkpoint("phi3", "mixed")
    asked, wanted = said(folder)
    with opened(folder) as llm:
        assert answers(llm, asked) == wanted


def test_a_model_loaded_the_old_way(checkpoint: Callable[..., Path], said: Callable[..., Any], tmp_path: Path) -> None:
    """Loaders that loop over `stacked_params_mapping` call each parameter's own loader with its place.

    MiniCPM's is such a one, and with these settings it is a Llama.
    """
    folder = checkpoint("llama", "mixed")
    asked, wanted = said(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    scales = {
        "scale_emb": 1,
        "scale_depth": config["num_hidden_layers"] ** 0.5,
        "dim_model_base": config["hidden_size"],
    }
    changed = config | scales | {"architectures": ["MiniCPMForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(changed))
    with opened(copy) as llm:
        assert answers(llm, asked) == wanted


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_real_weights(eager: bool, smollm: Path, said: Callable[..., Any]) -> None:
    asked, wanted = said(smollm, text_prompts(smollm, 80), 1e-3)  # logits up to 20, and 30 blocks of rounding
    with opened(smollm, enforce_eager=eager) as llm:
        assert answers(llm, asked) == wanted


MIXED = [(family, "mixed", True) for family in (*FAMILIES, "phi3")]
SOME = [("llama", mixture, True) for mixture in ("lowrank", "narrow")]
CASES = [*SOME, *MIXED, *[(family, "mixed", False) for family in FAMILIES]]


@pytest.mark.parametrize(("family", "mixture", "eager"), CASES)
def test_two_ranks(
    family: str,
    mixture: str,
    eager: bool,
    checkpoint: Callable[..., Path],
    said: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensor parallel: fused layers cut in each part, key heads, pivots, groups, and sums between the factors."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = checkpoint(family, mixture)
    asked, wanted = said(folder)
    with opened(folder, enforce_eager=eager, tensor_parallel_size=2) as llm:
        assert answers(llm, asked) == wanted
