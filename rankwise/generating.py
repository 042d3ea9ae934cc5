"""`rankwise generate`: through the runtime; by transformers' `generate` what neither it nor its fallback runs."""

import gc
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from rankwise import console
from rankwise.anatomy import require_context
from rankwise.engine.runtime.llm import LLM
from rankwise.engine.runtime.params import SamplingParams
from rankwise.errors import RankwiseError
from rankwise.zoo import load_model

log = logging.getLogger("rankwise")


@dataclass(frozen=True)
class Asked:
    """What `rankwise generate` is told.

    Args:
        source: the model.
        prompt: text.
        params: of the request.
        draft: a model that guesses ahead; None: none.
        chat: wrap the prompt in the model's chat template.
        max_model_len: tokens of prompt and output together; None: what the model was made for, at most 8192.
        device: of both models.
        dtype: of both models.
        as_json: one JSON object as the only line of stdout, with a draft `acceptance` among its keys.
    """

    source: str
    prompt: str
    params: SamplingParams
    draft: str | None
    chat: bool
    max_model_len: int | None
    device: str
    dtype: str
    as_json: bool

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a conversation."""
        return [{"role": "user", "content": self.prompt}]

    def require_template(self, tokenizer: Any) -> None:
        """Raise a RankwiseError if a chat template is wanted and the tokenizer has none."""
        if self.chat and not getattr(tokenizer, "chat_template", None):
            raise RankwiseError("chat", self.source, "its tokenizer has no chat template; leave --chat out")

    def require_room(self, length: int, most: int, more: str = "") -> None:
        """Raise a RankwiseError if a prompt of `length` tokens and its output are more than `most` together."""
        if length + self.params.max_tokens > most:
            found = f"{length + self.params.max_tokens} tokens"
            raise RankwiseError("prompt and max_tokens", found, f"allowed: up to {most}{more}")

    def answer(self, completion: str, tokens: int, **facts: Any) -> None:
        """Print the JSON object."""
        console.print_json({"prompt": self.prompt, "completion": completion, "tokens": tokens, **facts})


def generate(asked: Asked) -> None:
    """Continue a prompt, printing text as it comes.

    Raises:
        RankwiseError: as `LLM`, or the prompt and its output do not fit.
    """
    where: dict[str, Any] = {"device": asked.device, "dtype": asked.dtype, "max_model_len": asked.max_model_len}
    reason, llm = "", None
    try:
        llm = LLM(asked.source, draft=asked.draft, max_sequences=1, **where)
    except RankwiseError as error:
        if error.field != "model_type" or asked.draft is not None:
            raise
        reason = str(error)
    if llm is None:  # by now the error, whose frames hold the model, is gone
        log.warning("%s; transformers' generate runs it", reason)
        return _by_transformers(asked)
    asked.require_template(llm.tokenizer)
    ids, most = llm.chat(asked.messages) if asked.chat else llm.encode(asked.prompt), llm.engine.scheduler.most_length
    longest = getattr(llm.model_config, "max_position_embeddings", None) or most
    by_default = asked.max_model_len is None and llm.plan.tokens >= llm.engine.config.most_length  # no lack of memory
    asked.require_room(len(ids), most, f" (--max-model-len: up to {longest})" if by_default and longest > most else "")
    if not asked.as_json:
        return _show(llm.stream(ids, asked.params), "" if asked.chat else asked.prompt)
    done, tally = llm.generate(ids, asked.params)[0], llm.speculation
    facts = {} if tally is None else {"acceptance": tally.acceptance if tally.drafted else None}
    asked.answer(done.text, len(done.tokens), **facts)


def _show(pieces: Iterator[str], prompt: str) -> None:
    for piece in chain([prompt] if prompt else [], pieces, ["\n"]):
        sys.stdout.write(piece)
        sys.stdout.flush()


def _by_transformers(asked: Asked) -> None:
    """One plain `generate`, which draws as the runtime does: nothing of the model's own defaults."""
    from transformers import TextStreamer

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model, tokenizer = load_model(asked.source, asked.dtype, asked.device)
    asked.require_template(tokenizer)
    params, text = asked.params, asked.prompt
    torch.manual_seed(params.seed or 0)
    if asked.chat:
        text = tokenizer.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not asked.chat).to(model.device)
    length = inputs["input_ids"].shape[1]
    require_context(model, length + params.max_tokens, "prompt and max_tokens")
    if asked.max_model_len is not None:
        asked.require_room(length, asked.max_model_len)
    drawn = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
    sampling = {"repetition_penalty": 1.0} | (drawn if params.temperature > 0 else {"do_sample": False})
    streamer = None if asked.as_json else TextStreamer(tokenizer, skip_prompt=asked.chat, skip_special_tokens=True)
    out = model.generate(**inputs, max_new_tokens=params.max_tokens, streamer=streamer, **sampling)
    new = out[0, length:]
    if asked.as_json:
        asked.answer(tokenizer.decode(new, skip_special_tokens=True), len(new))
