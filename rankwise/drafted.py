"""`rankwise generate --draft`: through the runtime, with a second model that guesses ahead."""

import sys
from itertools import chain

from rankwise import console
from rankwise.engine.runtime.llm import LLM
from rankwise.engine.runtime.params import SamplingParams
from rankwise.errors import RankwiseError


def generate(
    source: str, draft: str, prompt: str, params: SamplingParams, chat: bool, device: str, dtype: str, as_json: bool
) -> None:
    """Continue a prompt, printing text as it comes.

    Args:
        source: the model.
        draft: the one that guesses.
        prompt: text.
        params: of the request.
        chat: wrap the prompt in the model's chat template.
        device: of both.
        dtype: of both.
        as_json: one JSON object as the only line of stdout, `acceptance` among its keys.

    Raises:
        RankwiseError: as `LLM`, or the prompt and its output do not fit.
    """
    llm = LLM(source, draft=draft, device=device, dtype=dtype, max_sequences=1)
    ids = llm.chat([{"role": "user", "content": prompt}]) if chat else llm.encode(prompt)
    most = llm.engine.scheduler.most_length
    if len(ids) + params.max_tokens > most:
        raise RankwiseError("prompt and max_tokens", f"{len(ids) + params.max_tokens} tokens", f"allowed: up to {most}")
    if as_json:
        done, tally = llm.generate(ids, params)[0], llm.speculation
        facts = {"acceptance": tally.acceptance if tally and tally.drafted else None}
        console.print_json({"prompt": prompt, "completion": done.text, "tokens": len(done.tokens), **facts})
        return
    for piece in chain([] if chat else [prompt], llm.stream(ids, params), ["\n"]):
        sys.stdout.write(piece)
        sys.stdout.flush()
