"""From bodies to jobs for the engine: tokens, and every limit that tokens have."""

from collections.abc import Sequence
from copy import deepcopy

from jinja2 import TemplateError

from rankwise.engine.doors.server.config import ServeConfig
from rankwise.engine.doors.server.faults import Fault
from rankwise.engine.doors.server.loop import Job
from rankwise.engine.doors.server.schema import ChatRequest, CompletionRequest, Sampling
from rankwise.engine.runtime.llm import LLM

DEFAULT_TOKENS = 16  # of a completion, as OpenAI's; a chat's answer may take what the context leaves


class Prompts:
    """Tokenizes on a thread of its own, with a tokenizer of its own.

    Args:
        llm: whose tokenizer and limits.
        config: further limits.
    """

    def __init__(self, llm: LLM, config: ServeConfig) -> None:
        self.tokenizer = deepcopy(llm.tokenizer)
        self.tokenizer("first")  # sets what a tokenizer sets at first use
        self.most_length = llm.engine.scheduler.most_length
        self.vocabulary = llm.vocabulary
        self.config = config

    def of_completion(self, body: CompletionRequest) -> list[Job]:
        """A job for every prompt and choice, prompts first.

        Raises:
            Fault: a limit is passed.
        """
        prompts = body.prompts
        self._check_count(body, len(prompts), "prompt")
        return [job for prompt in prompts for job in self._jobs(body, self._encode(prompt), "prompt", DEFAULT_TOKENS)]

    def of_chat(self, body: ChatRequest) -> list[Job]:
        """A job for every choice.

        Raises:
            Fault: a limit is passed, or the template cannot render the messages.
        """
        self._check_count(body, 1, "messages")
        if not getattr(self.tokenizer, "chat_template", None):
            raise Fault(400, "messages: this model has no chat template; use /v1/completions", param="messages")
        messages = [message.plain() for message in body.messages]
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            message = f"messages: the chat template refuses them ({error})"
            raise Fault(400, message, param="messages", code="invalid_value") from None
        return self._jobs(body, [int(token) for token in ids], "messages", None)

    def _encode(self, prompt: str | list[int]) -> list[int]:
        ids: list[int] = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        return ids

    def _check_count(self, body: Sampling, prompts: int, param: str) -> None:
        wanted, most = prompts * body.choices, self.config.capacity
        if not 0 < wanted <= most:
            at_fault = "n" if body.choices > 1 else param
            message = f"{at_fault}: {prompts} prompts with {body.choices} choices each; allowed: 1 to {most} together"
            raise Fault(400, message, param=at_fault, code="invalid_value")

    def _jobs(self, body: Sampling, ids: Sequence[int], param: str, default: int | None) -> list[Job]:
        if not 0 < len(ids) < self.most_length:
            code = "context_length_exceeded" if ids else "invalid_value"
            message = f"{param}: {len(ids)} tokens; allowed: 1 to {self.most_length - 1}"
            raise Fault(400, message, param=param, code=code)
        if not all(0 <= token < self.vocabulary for token in ids):
            message = f"{param}: a token id that the model does not have; allowed: 0 to {self.vocabulary - 1}"
            raise Fault(400, message, param=param, code="invalid_value")
        if (body.top_logprobs_wanted or 0) > self.vocabulary:
            raise Fault(400, f"logprobs: allowed: up to {self.vocabulary}", param="logprobs", code="invalid_value")
        count = self._count(body, len(ids), default)
        return [(list(ids), body.params(count, choice)) for choice in range(body.choices)]

    def _count(self, body: Sampling, length: int, default: int | None) -> int:
        """Tokens that may be generated."""
        asked, param = body.most_tokens
        room, most = self.most_length - length, self.config.max_tokens
        if asked is None:
            return min(room, most or room, default or room)
        if most is not None and asked > most:
            raise Fault(400, f"{param}: {asked}; allowed: up to {most}", param=param, code="invalid_value")
        if asked > room:
            message = f"{param}: {asked} after a prompt of {length} tokens; allowed: {self.most_length} together"
            raise Fault(400, message, param=param, code="context_length_exceeded")
        return asked
