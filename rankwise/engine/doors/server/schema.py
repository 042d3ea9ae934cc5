"""Bodies of requests. Numbers are taken as numbers only, and a field that is not known is refused, as OpenAI does.

Fields of OpenAI's that do not change the answer are taken and left aside; those that would change it, and are not
offered here, are refused unless they ask for nothing.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from rankwise.engine.runtime.params import COLD, MOST_K, SEEDS, SamplingParams

ASIDE = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


def refuse(param: str, message: str) -> PydanticCustomError:
    """An error that names its field, of the object that is being read; the message does not name it again."""
    return PydanticCustomError("refused", "{text}", {"param": param, "text": message})


def _whole(text: str) -> str:
    """JSON can escape halves of characters, which no tokenizer takes."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PydanticCustomError("broken_text", "half of a surrogate pair; allowed: whole characters")
    return text


Text = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[Text, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """No conversions, no unknown fields.

    `neutral` are fields that are not offered, with the values, beside null, that ask for nothing; `aside` are fields
    whose values do not matter.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    aside: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _set_aside(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, allowed in cls.neutral.items():
            value = data.get(name)
            if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
                raise refuse(name, "not offered by this server; leave it out")
        return {key: value for key, value in data.items() if key not in cls.neutral and key not in cls.aside}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With the fields that are taken and have no effect."""
        whole = handler(core)
        fields = handler.resolve_ref_schema(whole).setdefault("properties", {})
        for name, allowed in cls.neutral.items():
            fields[name] = {"enum": [None, *allowed], "description": "Not offered; what asks for nothing is taken."}
        fields.update({name: {"description": "Taken, without effect."} for name in cls.aside})
        return whole


class StreamOptions(Strict):
    """Of a stream."""

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class Sampling(Strict):
    """What both kinds of request have."""

    neutral = {"logit_bias": ({},)}
    aside = ASIDE

    model: str
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    n: int | None = Field(1, ge=1, le=128)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, ge=0, le=1)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS)
    stream: bool | None = False
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    top_k: int | None = Field(0, ge=-1, le=MOST_K, description="Extension; 0 and -1: all.")
    min_p: float | None = Field(0.0, ge=0, le=1, description="Extension.")
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100, description="Extension.")
    ignore_eos: bool | None = Field(False, description="Extension.")

    @model_validator(mode="after")
    def _streams(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "only with stream")
        return self

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def most_tokens(self) -> tuple[int | None, str]:
        """The limit that the client set, and the field it set it in."""
        return self.max_tokens, "max_tokens"

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many, beside the chosen token's; None: no log-probabilities."""
        raise NotImplementedError

    def params(self, max_tokens: int, choice: int) -> SamplingParams:
        """For one sequence; each further choice draws with the next seed."""
        temperature = 1.0 if self.temperature is None else self.temperature
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else max(self.top_p, COLD),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            stop=stop,
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.top_logprobs_wanted,
            seed=None if self.seed is None else (self.seed + choice) % SEEDS,
        )


class CompletionRequest(Sampling):
    """Of `/v1/completions`."""

    neutral = Sampling.neutral | {"echo": (False,), "suffix": ("",)}

    prompt: Text | list[Text] | list[int] | list[list[int]]
    best_of: int | None = Field(None, ge=1, le=128, description="Only as many as n: none of the answers is left out.")
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _all_are_given(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.choices:
            raise refuse("best_of", f"{self.best_of}, with n {self.choices}; allowed: the same as n")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def top_logprobs_wanted(self) -> int | None:
        """As `Sampling` says."""
        return self.logprobs


class TextPart(Strict):
    """A part of a message; there are only texts."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """Of a conversation. Clients send back whole answers, with all the fields that these can have."""

    neutral = {
        "refusal": ("",),
        "tool_calls": ([],),
        "function_call": ({},),
        "audio": ({},),
        "annotations": ([],),
        "reasoning_content": ("",),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = Field(description="Null, of an assistant alone, is an empty text.")
    name: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise refuse("content", "null; allowed: text")
        return self

    def plain(self) -> dict[str, str]:
        """For a chat template; `developer` is OpenAI's newer word for `system`."""
        parts = self.content or ""
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **named}


class ChatRequest(Sampling):
    """Of `/v1/chat/completions`."""

    neutral = Sampling.neutral | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31, description="Or max_tokens.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Only with logprobs.")

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", "only with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise refuse("max_tokens", "only one of max_tokens and max_completion_tokens")
        return self

    @property
    def most_tokens(self) -> tuple[int | None, str]:
        """As `Sampling` says."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def top_logprobs_wanted(self) -> int | None:
        """As `Sampling` says."""
        return (self.top_logprobs or 0) if self.logprobs else None
