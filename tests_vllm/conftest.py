"""vLLM in this process, one model after another; it is imported once."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for setting, chosen in SETTINGS.items():
    os.environ.setdefault(setting, chosen)

from tests_vllm import models

Said = tuple[list[list[int]], list[list[int]]]


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is compiled is compiled here, and not found from the last time."""
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`checkpoint("llama", "mixed")`: a folder, made once."""
    made: dict[tuple[str, str], Path] = {}

    def folder(family: str, mixture: str) -> Path:
        if (family, mixture) not in made:
            out = tmp_path_factory.mktemp(family) / mixture
            made[family, mixture] = models.compressed(family, mixture, out)
        return made[family, mixture]

    return folder


@pytest.fixture(scope="session")
def said() -> Callable[..., Said]:
    """Prompts, and what transformers says to them."""
    known: dict[Path, Said] = {}

    def answers(folder: Path, *options: Any) -> Said:
        if folder not in known:
            known[folder] = models.asked_and_said(folder, *options)
        return known[folder]

    return answers


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model, compressed."""
    return models.smollm(tmp_path_factory.mktemp("smollm") / "small")


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Any]:
    """A model in vLLM, in fp32 and eager unless told otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True, "seed": 0}
    llm = LLM(model=str(folder), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def answers(llm: Any, asked: list[list[int]], tokens: int = 32) -> list[list[int]]:
    """What vLLM says, greedily."""
    from vllm import SamplingParams

    how = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    done = llm.generate([{"prompt_token_ids": ids} for ids in asked], how, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in done]
