"""Architectures that our decoder does not cover, through transformers' continuous batching behind the engine's face.

transformers schedules, keeps the paged cache and computes logits; tokens are chosen by our sampler, so that every
sampling option works as it does elsewhere. No thread of its own: `step` makes one of its steps.
"""

import logging
import weakref
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

import torch

from rankwise.engine.runtime.acceptance import Choices
from rankwise.engine.runtime.continuous import Chooser, Pages, Requests, make_manager
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.loader import fixed_length, layer_kv_bytes, rope_types
from rankwise.engine.runtime.memory import MemoryPlan, plan_blocks, step_bytes
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.sequence import Sequence
from rankwise.errors import RankwiseError

TOKENS = 1 << 15  # of the cache, if nothing else is asked for: attention masks are as long as it is
CLOSE = 0.05  # largest relative difference from the model's own logits that the check after loading lets pass
PROMPTS = ((5, 9, 7, 3, 8), (6, 4, 5))  # of that check: two lengths side by side
log = logging.getLogger("rankwise")


def make_fallback(model: Any, eos: Many[int], limits: EngineConfig, kv_tokens: int | None) -> tuple[Engine, MemoryPlan]:
    """An engine for a model, and what its cache takes.

    Args:
        model: as in `Fallback`.
        eos: likewise.
        limits: likewise, but for `blocks`.
        kv_tokens: that the cache holds; None: all sequences at full length, `TOKENS` at most.

    Raises:
        RankwiseError: too little memory, no keys and values to keep, or as `Fallback`.
    """
    config, size = model.config.get_text_config(), limits.block_size
    try:
        bytes_ = size * layer_kv_bytes(config, model.dtype) * config.num_hidden_layers
    except AttributeError as failure:  # without attention heads it is no transformer
        raise _refusal(model, str(failure)) from failure
    wanted = min(TOKENS, limits.most_sequences * limits.most_length)
    workspace = step_bytes(config, model.dtype, limits.most_tokens, limits.most_sequences)
    plan = plan_blocks(bytes_, model.device, size, kv_tokens, wanted, workspace)
    return Fallback(model, replace(limits, blocks=plan.blocks, graphs=False), eos), plan


class Fallback(Engine):
    """A transformers model as an engine.

    Args:
        model: a causal language model of transformers, on its device; it stays as it is.
        config: limits; `share` works for models without sliding windows only.
        eos: ids that end a sequence.

    Raises:
        RankwiseError: transformers' continuous batching cannot run it, or gives other logits than the model does.
    """

    def __init__(self, model: Any, config: EngineConfig, eos: Many[int] = ()) -> None:
        self.model, self.config, self.eos, self.drafter = model, config, frozenset(eos), None
        self.chooser, plain = Chooser(), model.config._attn_implementation
        _require_fixed_angles(model, config.most_length)
        try:
            self.manager = make_manager(model, config, self.chooser)
            weakref.finalize(self, setattr, self.manager, "batch_processor", None)  # while Python is still whole
            batch = self.manager.batch_processor
            self.scheduler = Requests(batch.scheduler, config, self.chooser)  # type: ignore[assignment]
            self.pool = Pages(batch.cache, config)  # type: ignore[assignment]
            error = self._difference(plain)
        except Exception as failure:  # transformers has no list of what it covers here; it breaks in many ways
            reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
            raise _refusal(model, reason) from failure
        if not error < CLOSE:
            raise _refusal(model, f"its logits are off by {error:.2g}")
        log.warning("%s: not an architecture of the runtime; transformers' continuous batching runs it", _kind(model))

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """One pass through the model; the sequences that got a token."""
        batch = self.manager.batch_processor
        if not self.busy:
            return []
        if not batch.prepare_next_batch():
            raise RuntimeError("transformers has requests and schedules none of them")
        for request in batch.inputs_and_outputs.requests_in_batch:
            self._note(request.state, request.query_length)
        grown = self.chooser.sequences
        batch._generation_step(self.model)
        batch.update_batch()
        for sequence, chosen in zip(grown, self.chooser.choices, strict=True):
            self._take(sequence, chosen)
        return grown

    @property
    def cache_bytes(self) -> int:
        """Of all keys and values."""
        return int(self.manager.batch_processor.cache.cache_tensor.nbytes)

    def _note(self, state: Any, count: int) -> None:
        """How far a sequence is computed when this step, with `count` of its tokens, is done."""
        sequence = self.chooser.known[state.request_id]
        if not sequence.computed:
            sequence.cached = state.position_offset - count
        sequence.computed = state.position_offset

    def _take(self, sequence: Sequence, chosen: Choices) -> None:
        [(token, logprob)] = chosen
        sequence.output.append(token)
        sequence.fresh = 1
        if logprob is not None:
            sequence.logprobs.append(logprob)
        if reason := self._reason(sequence, token):
            self.finish(sequence, reason)

    def _difference(self, attention: str) -> float:
        """Relative difference of the last logits of a few packed, paged steps from those of one plain pass.

        Args:
            attention: the implementation that the model came with.
        """
        params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        own = self.model.config.get_text_config().vocab_size
        sequences = [self.add([token % own for token in prompt], params) for prompt in PROMPTS]
        for _ in self.run():
            ids = [sequence.prompt + sequence.output[:-1] for sequence in sequences]
        errors, paged = [], self.model.config._attn_implementation
        self.model.set_attn_implementation(attention)
        for ours, sequence in zip(self.chooser.scores, ids, strict=True):
            tensor = torch.tensor([sequence], device=self.model.device)
            with torch.no_grad():
                plain = self.model(input_ids=tensor, use_cache=False).logits[0, -1].float()
            errors.append(float((ours - plain).norm() / plain.norm()))
        self.model.set_attn_implementation(paged)
        return max(errors)


def _require_fixed_angles(model: Any, length: int) -> None:
    """Packed sequences share their angles, which must not depend on how long each of them is."""
    short = fixed_length(model.config)
    if short is not None and length > short:
        kind = " and ".join(sorted(rope_types(model.config)))
        raise RankwiseError("max_model_len", length, f"rope_type {kind}: allowed: up to {short}")


def _kind(model: Any) -> str:
    return str(model.config.model_type)


def _refusal(model: Any, reason: str) -> RankwiseError:
    text = f"{_kind(model)} ({reason})"
    return RankwiseError("model_type", text, "neither the runtime nor transformers' continuous batching runs it")
