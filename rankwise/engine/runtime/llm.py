"""`rankwise.LLM`: a model, dense or compressed, that generates text for many prompts at once."""

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from numbers import Integral
from typing import Any

from rankwise.config import check, check_count
from rankwise.engine.runtime.draft import load_draft, make_drafter
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.loader import convert, fixed_length, is_supported
from rankwise.engine.runtime.memory import MemoryPlan, plan_memory, step_bytes
from rankwise.engine.runtime.params import Completion, SamplingParams
from rankwise.engine.runtime.sequence import Sequence
from rankwise.engine.runtime.speculative import Tally
from rankwise.engine.runtime.text import Output, TextStream
from rankwise.errors import RankwiseError
from rankwise.kernels import native
from rankwise.progress import Track, silent
from rankwise.zoo import load_model

Prompt = str | Many[int]
log = logging.getLogger("rankwise")


class LLM:
    """Text in, text out, over the engine.

    `backend` says what computes: `rankwise`, our decoder, or `transformers` for architectures that it does not cover.
    `plan` says what the KV cache takes; at its level INFO the logger `rankwise` tells it, too. One thread at a time
    uses it; streams and calls of `generate` may be open side by side, each step serves all of them.

    Args:
        model: a hub id, a folder (dense or compressed), a `.gguf` file or `embedded:smollm2-135m`.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        max_model_len: tokens of a sequence, its output included; None: what the model was made for, at most 8192.
        kv_tokens: tokens that the KV cache holds; None: what memory allows.
        max_sequences: that run at once.
        max_batched_tokens: of one step; longer prompts come in chunks.
        block_size: tokens a block of the cache.
        prefix_caching: prompts that begin alike share their keys and values.
        cuda_graphs: on a GPU, steps that only decode run as captured graphs; off saves their memory and first captures.
        draft: a model with the same tokens that guesses ahead, usually a compressed checkpoint of `model`; None: none.
        draft_tokens: it guesses in a step.
        draft_sequences: while more than so many decode, nothing is guessed.

    Raises:
        RankwiseError: nothing loadable there, an architecture that neither we nor transformers' continuous batching
            covers, too little memory, or a draft that has other tokens.
    """

    engine: Engine
    plan: MemoryPlan

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        kv_tokens: int | None = None,
        max_sequences: int = 64,
        max_batched_tokens: int = 1024,
        block_size: int = 16,
        prefix_caching: bool = True,
        cuda_graphs: bool = True,
        draft: str | None = None,
        draft_tokens: int = 4,
        draft_sequences: int = 16,
    ) -> None:
        sizes = {"max_sequences": max_sequences, "max_batched_tokens": max_batched_tokens, "block_size": block_size}
        for name, count in (sizes if kv_tokens is None else sizes | {"kv_tokens": kv_tokens}).items():
            check_count(name, count, 1)
        self._outputs: dict[Sequence, Output] = {}
        native.start()  # the compiler, if it must run, runs while the model is read
        loaded, self.tokenizer = load_model(model, dtype, device)
        longest = getattr(loaded.config, "max_position_embeddings", None) or max(8192, max_model_len or 0)
        length = min(longest, 8192, fixed_length(loaded.config) or longest) if max_model_len is None else max_model_len
        if not 1 < length <= longest:
            raise RankwiseError("max_model_len", length, f"allowed: 2 to {longest}")
        self.model_config, self.device = loaded.config, loaded.device
        self.vocabulary: int = loaded.get_input_embeddings().num_embeddings
        self.backend = "rankwise" if is_supported(loaded.config) else "transformers"
        if self.backend == "transformers" and draft is not None:
            raise RankwiseError("draft", draft, f"left out: {loaded.config.model_type} runs through transformers")
        config = EngineConfig(
            blocks=0,
            block_size=block_size,
            most_sequences=max_sequences,
            most_tokens=max_batched_tokens,
            most_length=length,
            share=prefix_caching,
            graphs=cuda_graphs,
        )
        eos = loaded.generation_config.eos_token_id
        ends = [eos] if isinstance(eos, int) else eos or ()
        if self.backend == "transformers":
            from rankwise.engine.runtime.fallback import make_fallback

            self.engine, self.plan = make_fallback(loaded, ends, config, kv_tokens)
        else:
            rows = max(max_sequences, draft_sequences * (draft_tokens + 1) if draft else 0)
            workspace = step_bytes(loaded.config, loaded.dtype, max_batched_tokens, rows) * (2 if draft else 1)
            decoder = convert(loaded, length)
            del loaded
            guesser = load_draft(draft, dtype, device, length, self.tokenizer, self.vocabulary) if draft else None
            self.plan = plan_memory(decoder, block_size, kv_tokens, max_sequences * length, guesser, workspace)
            config = replace(config, blocks=self.plan.blocks)
            drafter = None if guesser is None else make_drafter(guesser, config, draft_tokens, draft_sequences)
            self.engine = Engine(decoder, config, ends, drafter)
        log.info("%s", self.plan)

    @property
    def speculation(self) -> Tally | None:
        """What came of the draft so far; None without one."""
        return self.engine.speculation

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        params: SamplingParams | Many[SamplingParams] | None = None,
        *,
        track: Track = silent,
    ) -> list[Completion]:
        """Complete prompts, together.

        Args:
            prompts: texts or lists of token ids; one, or many.
            params: for all of them, or one for each; the defaults of `SamplingParams` if None.
            track: progress.

        Raises:
            RankwiseError: a prompt is empty or too long (then none is run), or there are not as many params as prompts.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
        many: list[Any] = [prompts] if single else list(prompts)
        alike = params is None or isinstance(params, SamplingParams)
        each: list[Any] = [params or SamplingParams()] * len(many) if alike else list(params)  # type: ignore[arg-type]
        if len(each) != len(many):
            raise RankwiseError("params", len(each), f"one, or {len(many)} as there are prompts")
        added = self._add(many, each)
        try:
            with track("requests", len(many)) as advance:
                for _ in self._finished(added):
                    advance()
            outputs = [self._outputs[sequence] for sequence in added]
            for output in outputs:
                output.require_text()
            return [self.completion(sequence, o.text) for sequence, o in zip(added, outputs, strict=True)]
        finally:
            self._forget(added)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Pieces of one output as they come; closing the iterator early cancels the request."""
        [sequence] = self._add([prompt], [params or SamplingParams()])
        output = self._outputs[sequence]
        try:
            while not sequence.finish_reason:
                if not output.unread:
                    self._step()
                if piece := output.take():
                    yield piece
            output.require_text()
            if piece := output.take() + output.text.finish():
                yield piece
        finally:
            self._forget([sequence])

    def chat(self, messages: Many[dict[str, str]]) -> list[int]:
        """The prompt of a conversation by the tokenizer's chat template, as ids.

        Raises:
            RankwiseError: the tokenizer has no template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise RankwiseError("messages", "no chat template", "this model's tokenizer has none: use a prompt")
        ids = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        return [int(token) for token in ids]

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt; ids are taken as they are.

        Raises:
            RankwiseError: an id that the model does not have.
        """
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt).input_ids)
        ids = [int(token) for token in prompt]
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        check("prompt", f"token {wrong}", wrong is None, f"ids from 0 to {self.vocabulary - 1}")
        return ids

    def completion(self, sequence: Sequence, text: TextStream) -> Completion:
        """What a finished request came to."""
        text.finish()
        return Completion(
            prompt_tokens=sequence.prompt,
            tokens=sequence.output,
            text=text.text,
            finish_reason=sequence.finish_reason,
            logprobs=sequence.logprobs if sequence.params.logprobs is not None else None,
            cached_tokens=sequence.cached,
        )

    def _add(self, prompts: Many[Prompt], params: Many[SamplingParams]) -> list[Sequence]:
        added: list[Sequence] = []
        try:
            for prompt, each in zip(prompts, params, strict=True):
                ids = self.encode(prompt)
                added.append(self.engine.add(ids, each))
                self._outputs[added[-1]] = Output(TextStream(self.tokenizer, each.stop, ids))
        except BaseException:
            self._forget(added)
            raise
        return added

    def _forget(self, sequences: Many[Sequence]) -> None:
        """Let go of requests; those that are not finished are cancelled."""
        for sequence in sequences:
            self._outputs.pop(sequence, None)
        for sequence in sequences:
            self.engine.cancel(sequence)

    def _finished(self, sequences: Many[Sequence]) -> Iterator[Sequence]:
        """Run until all are finished; each sequence once, when it is."""
        left = list(sequences)
        while left:
            yield from [sequence for sequence in left if sequence.finish_reason]
            left = [sequence for sequence in left if not sequence.finish_reason]
            if left:
                self._step()

    def _step(self) -> None:
        """One step of the engine; every sequence's tokens become its text, whoever waits for them."""
        for sequence in self.engine.step():
            output = self._outputs.get(sequence)
            if output is None:
                continue
            try:
                self._push(sequence, output)
            except Exception as error:  # of the tokenizer: this text's trouble alone
                output.error = error
                self.engine.cancel(sequence)

    def _push(self, sequence: Sequence, output: Output) -> None:
        """Take a step's tokens of a sequence; what comes after a stop text is dropped."""
        for at in range(len(sequence.output) - sequence.fresh, len(sequence.output)):
            output.unread += output.text.push(sequence.output[at])
            if output.text.stopped:
                self.engine.finish(sequence, "stop", at + 1)
                break
