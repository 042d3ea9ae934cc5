"""A contestant in its process: how each engine loads a model, checks itself and generates."""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch

from rankwise.bench.arrivals import Request
from rankwise.bench.config import BenchConfig, Contestant
from rankwise.bench.gate import require_cache
from rankwise.bench.memory import Footprint, footprint, of_decoder, of_model
from rankwise.bench.stepped import Stamps, Stepped
from rankwise.engine.runtime.llm import LLM
from rankwise.engine.runtime.params import SamplingParams
from rankwise.errors import RankwiseError
from rankwise.zoo import SHORT_NAMES


class Runner(Protocol):
    """A loaded contestant.

    Args:
        device: where it computes.
        dtype: `bf16`, `fp16`, `fp32` or what it calls its own.
        vocabulary: ids are below it.
        footprint: its bytes.
    """

    device: torch.device
    dtype: str
    vocabulary: int
    footprint: Footprint

    def gate(self) -> None:
        """Raise a RankwiseError unless its numbers are the same with and without a KV cache."""

    def batch(self, prompts: Sequence[list[int]], new_tokens: int) -> Stamps:
        """Complete prompts of one length that come all at once."""

    def serve(self, trace: Sequence[Request]) -> Stamps:
        """Complete requests that come when they come."""


def load_runner(contestant: Contestant, config: BenchConfig) -> Runner:
    """Load a contestant.

    Raises:
        RankwiseError: its model cannot be loaded, or a sequence would be longer than its context.
    """
    if contestant.engine == "rankwise":
        return Runtime(contestant, config)
    if contestant.engine == "vllm":
        from rankwise.bench.vllm import Vllm

        return Vllm(contestant, config)
    from rankwise.bench.generate import Generate

    return Generate(contestant, config)


class Runtime(Stepped):
    """`rankwise.LLM`, without prefix caching: no two prompts begin alike."""

    def __init__(self, contestant: Contestant, config: BenchConfig) -> None:
        self.contestant, self.longest = contestant, config.longest
        sizes: dict[str, Any] = {
            "max_model_len": config.longest,
            "kv_tokens": config.cache_tokens,
            "max_sequences": config.together,
        }
        where: dict[str, Any] = {"dtype": config.dtype, "device": config.device, "prefix_caching": False}
        try:
            self.llm = LLM(contestant.model, **where, **sizes)
        except RankwiseError as error:
            if error.field != "max_model_len":
                raise
            raise RankwiseError("prompt and new_tokens", config.longest, error.allowed) from None
        engine, self.device, self.vocabulary = self.llm.engine, self.llm.device, self.llm.vocabulary
        model = getattr(engine, "model", None)  # an architecture that runs through transformers
        dtype = engine.decoder.embed.dtype if model is None else model.dtype
        bytes_ = of_decoder(engine.decoder) if model is None else of_model(model)
        self.dtype, self.footprint = SHORT_NAMES[dtype], footprint(self.llm.model_config, *bytes_, dtype)

    def gate(self) -> None:
        """See `require_cache`."""

        def top(prompt: list[int], count: int) -> tuple[list[int], dict[int, float]]:
            params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, logprobs=20)
            [done] = self.llm.generate(prompt, params)
            assert done.logprobs is not None
            return done.tokens, done.logprobs[-1].top

        require_cache(str(self.contestant), top, self.vocabulary, self.longest)

    def add(self, prompt: list[int], new_tokens: int) -> Hashable:
        """As `Stepped`."""
        return self.llm.engine.add(prompt, SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True))

    def step(self) -> list[tuple[Hashable, int]]:
        """As `Stepped`."""
        return [(sequence, len(sequence.output)) for sequence in self.llm.engine.step()]

    @property
    def busy(self) -> bool:
        """As `Stepped`."""
        return self.llm.engine.busy


def model_footprint(model: Any) -> Footprint:
    """Of a transformers model."""
    return footprint(model.config, *of_model(model), model.dtype)
