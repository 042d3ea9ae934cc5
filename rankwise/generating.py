"""`rankwise generate`: through the runtime; by transformers' `generate` what neither it nor its fallback runs."""

import gc
import logging
import sys
from collections.abc import Iterator
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


def generate(
    source: str,
    prompt: str,
    params: SamplingParams,
    *,
    draft: str | None,
    chat: bool,
    max_model_len: int | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Continue a prompt, printing text as it comes.

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

    Raises:
        RankwiseError: as `LLM`, or the prompt and its output do not fit.
    """
    reason, llm = "", None
    try:
        llm = LLM(source, draft=draft, device=device, dtype=dtype, max_sequences=1, max_model_len=max_model_len)
    except RankwiseError as error:
        if error.field != "model_type" or draft is not None:
            raise
        reason = str(error)
    if llm is None:  # by now the error, whose frames hold the model, is gone
        log.warning("%s; transformers' generate runs it", reason)
        return _by_transformers(source, prompt, params, chat, max_model_len, device, dtype, as_json)
    if chat:
        _require_template(llm.tokenizer, source)
    ids = llm.chat([{"role": "user", "content": prompt}]) if chat else llm.encode(prompt)
    wanted, most = len(ids) + params.max_tokens, llm.engine.scheduler.most_length
    if wanted > most:
        longest = getattr(llm.model_config, "max_position_embeddings", None) or most
        short = llm.plan.tokens < llm.engine.config.most_length  # of memory, not of context
        more = f" (--max-model-len: up to {longest})" if max_model_len is None and longest > most and not short else ""
        raise RankwiseError("prompt and max_tokens", f"{wanted} tokens", f"allowed: up to {most}{more}")
    if not as_json:
        return _show(llm.stream(ids, params), "" if chat else prompt)
    done, tally = llm.generate(ids, params)[0], llm.speculation
    facts = {} if tally is None else {"acceptance": tally.acceptance if tally.drafted else None}
    console.print_json({"prompt": prompt, "completion": done.text, "tokens": len(done.tokens), **facts})


def _show(pieces: Iterator[str], prompt: str) -> None:
    for piece in chain([prompt] if prompt else [], pieces, ["\n"]):
        sys.stdout.write(piece)
        sys.stdout.flush()


def _require_template(tokenizer: Any, source: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise RankwiseError("chat", source, "its tokenizer has no chat template; leave --chat out")


def _by_transformers(
    source: str,
    prompt: str,
    params: SamplingParams,
    chat: bool,
    max_model_len: int | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """One plain `generate`, which draws as the runtime does: nothing of the model's own defaults."""
    from transformers import TextStreamer

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model, tokenizer = load_model(source, dtype, device)
    if chat:
        _require_template(tokenizer, source)
    torch.manual_seed(params.seed or 0)
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) if chat else prompt
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    length = inputs["input_ids"].shape[1]
    wanted = length + params.max_tokens
    require_context(model, wanted, "prompt and max_tokens")
    if max_model_len is not None and wanted > max_model_len:
        raise RankwiseError("prompt and max_tokens", f"{wanted} tokens", f"allowed: up to {max_model_len}")
    drawn = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
    sampling = {"repetition_penalty": 1.0} | (drawn if params.temperature > 0 else {"do_sample": False})
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    out = model.generate(**inputs, max_new_tokens=params.max_tokens, streamer=streamer, **sampling)
    new = out[0, length:]
    if as_json:
        completion = tokenizer.decode(new, skip_special_tokens=True)
        console.print_json({"prompt": prompt, "completion": completion, "tokens": len(new)})
