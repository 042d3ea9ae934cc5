"""transformers' continuous batching with the faces of our scheduler, our pool and our sampler."""

from typing import Any, ClassVar

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import RequestState

from rankwise.engine.runtime.acceptance import Choices, choose
from rankwise.engine.runtime.engine import EngineConfig
from rankwise.engine.runtime.scheduler import require_fit
from rankwise.engine.runtime.sequence import Sequence


class Chooser(ContinuousBatchingLogitsProcessor):
    """Chooses each token by our sampler and leaves transformers' argmax no other."""

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.known: dict[str, Sequence] = {}
        self.sequences: list[Sequence] = []
        self.choices: list[Choices] = []
        self.scores = torch.empty(0)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Nothing is passed through the tensor; it is there because one is asked for."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Note whose rows come."""
        self.sequences = [self.known[request.state.request_id] for request in requests_with_new_token]
        self.choices = []
        return torch.zeros(len(self.sequences), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """`[N, vocabulary]` logits in, 0 at the chosen tokens and -inf elsewhere out."""
        if not self.sequences:
            return scores
        self.scores = scores
        self.choices = choose(scores, self.sequences)
        tokens = torch.tensor([[chosen[0][0]] for chosen in self.choices], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0)


class Requests:
    """transformers' scheduler with the face of ours.

    Args:
        inner: that scheduler.
        config: limits.
        chooser: to tell whose request is whose.
    """

    def __init__(self, inner: Any, config: EngineConfig, chooser: Chooser) -> None:
        self.inner, self.known = inner, chooser.known
        self.most_length = min(config.most_length, config.blocks * config.block_size)

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that have not begun, or lost their place."""
        return [self.known[name] for name in self.inner.waiting_requests]

    @property
    def running(self) -> list[Sequence]:
        """Sequences that hold some of the cache."""
        return [self.known[name] for name in self.inner.active_requests]

    def add(self, sequence: Sequence) -> None:
        """As our `Scheduler.add`; where sequences end is decided by us, so transformers gets no limit."""
        require_fit(sequence, self.most_length)
        name = str(sequence.number)
        self.known[name] = sequence
        self.inner.add_waiting_request(RequestState(name, list(sequence.prompt), max_new_tokens=None))

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, and free what it holds at once."""
        name = str(sequence.number)
        if self.known.pop(name, None) is not None:
            self.inner.set_request_cancellation(name)
            self.inner.clear_cancelled_requests()
            self.inner.block_new_requests = False


class Pages:
    """transformers' cache with the face of our pool, in blocks of `size` tokens.

    Args:
        cache: its paged cache.
        config: limits.
    """

    def __init__(self, cache: Any, config: EngineConfig) -> None:
        self.cache, self.size = cache, config.block_size

    @property
    def count(self) -> int:
        """Blocks in all."""
        return int(self.cache.num_blocks)

    def available(self) -> int:
        """Blocks that no sequence holds; those that are only kept for prompts that begin alike are free."""
        kept = sum(len(a.ledger.cached_blocks) * a.bytes_per_block for a in self.cache.cache_allocators.values())
        whole = self.cache.num_sectors * self.cache.bytes_per_sector
        return round(self.count * (self.cache.compute_free_capacity() + kept / whole))


def make_manager(model: Any, config: EngineConfig, chooser: Chooser) -> Any:
    """A manager whose thread is never started; `warmup` makes its cache."""
    options = ContinuousBatchingConfig(
        page_size=config.block_size,
        num_blocks=config.blocks,
        max_batch_tokens=config.most_tokens,
        max_requests_per_batch=config.most_sequences,
        max_blocks_per_request=0,
        allow_block_sharing=config.share,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,  # it would look for kernels on the hub
    )
    plain = GenerationConfig(do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(generation_config=plain, continuous_batching_config=options)
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([chooser]))
    manager.logit_processor.tensors_required = 1
    manager.warmup()
    return manager
