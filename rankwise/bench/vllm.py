"""vLLM, in this process, without prefix caching; folders of ours run there through the plugin."""

import os
from collections.abc import Hashable
from itertools import count
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rankwise.bench.config import BenchConfig, Contestant
from rankwise.bench.gate import require_cache
from rankwise.bench.memory import Footprint, footprint, of_model
from rankwise.bench.stepped import Stepped
from rankwise.engine.checkpoint import specs_from_config
from rankwise.engine.doors.hf import METHOD, replace_layers
from rankwise.zoo import SHORT_NAMES, TORCH_DTYPES, local_folder, resolve_device

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that its memory is this process's
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import vllm
from vllm.sampling_params import RequestOutputKind

BLOCK = 16  # tokens a block of its cache


class Vllm(Stepped):
    """As `Runner` and `Stepped`."""

    def __init__(self, contestant: Contestant, config: BenchConfig) -> None:
        self.contestant, self.longest, self.device = contestant, config.longest, resolve_device(config.device)
        source = str(local_folder(contestant.model, config.dtype) or contestant.model)
        stored = AutoConfig.from_pretrained(source)
        dtype = TORCH_DTYPES.get(config.dtype, stored.dtype or torch.bfloat16)
        self.dtype, self.footprint = SHORT_NAMES[dtype], _footprint(stored, dtype)
        cache = self.footprint.kv_bytes(config.longest + BLOCK) * config.together
        if self.device.type == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, -(-cache // 2**30))))  # GiB
        options: dict[str, Any] = {} if self.device.type == "cpu" else {"kv_cache_memory_bytes": 2 * cache}
        self.llm = vllm.LLM(
            model=source,
            dtype=dtype,
            max_model_len=config.longest + 1,
            max_num_seqs=config.together,
            enable_prefix_caching=False,
            **options,
        )
        self.engine, self.numbers = self.llm.llm_engine, count()
        self.vocabulary = stored.get_text_config().vocab_size

    def gate(self) -> None:
        """See `require_cache`."""

        def top(prompt: list[int], tokens: int) -> tuple[list[int], dict[int, float]]:
            [done] = self.llm.generate(_ids(prompt), _greedy(tokens, 20), use_tqdm=False)
            output = done.outputs[0]
            last = sorted(output.logprobs[-1].items(), key=lambda item: -item[1].logprob)[:20]
            return list(output.token_ids), {token: entry.logprob for token, entry in last}

        require_cache(str(self.contestant), top, self.vocabulary, self.longest)

    def add(self, prompt: list[int], new_tokens: int) -> Hashable:
        """As `Stepped`."""
        name = str(next(self.numbers))
        self.engine.add_request(name, _ids(prompt), _greedy(new_tokens))
        return name

    def step(self) -> list[tuple[Hashable, int]]:
        """As `Stepped`."""
        return [(done.request_id, len(done.outputs[0].token_ids)) for done in self.engine.step()]

    @property
    def busy(self) -> bool:
        """As `Stepped`."""
        return bool(self.engine.has_unfinished_requests())


def _ids(prompt: list[int]) -> dict[str, list[int]]:
    return {"prompt_token_ids": prompt}


def _greedy(tokens: int, logprobs: int | None = None) -> Any:
    kind = RequestOutputKind.CUMULATIVE
    return vllm.SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=logprobs, detokenize=False, output_kind=kind
    )


def _footprint(config: Any, dtype: torch.dtype) -> Footprint:
    """Of the same model in transformers, none of whose weights is loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") == METHOD:
        replace_layers(model, specs_from_config(stored, "config.json"))
    return footprint(config, *of_model(model), dtype)
