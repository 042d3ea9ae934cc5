"""What a request asks for, and what it gets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rankwise.config import check, check_count
from rankwise.errors import RankwiseError

MOST_K = 2**31  # more than any vocabulary has; it fits the int64 of a column
SEEDS = 2**63  # from -SEEDS on, SEEDS excluded
COLD = 1e-5  # below this temperature the likeliest token is taken; dividing by less leaves the range of fp32


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Args:
        max_tokens: new tokens at most.
        temperature: divides the logits; 0, and all up to `COLD`, takes the likeliest token.
        top_k: so many likeliest tokens stay; 0: all.
        top_p: the fewest tokens stay that have this probability together.
        min_p: tokens of less than this share of the largest probability go.
        repetition_penalty: logits of tokens seen in prompt or output are divided by it (multiplied if negative).
        presence_penalty: taken from the logits of tokens seen in the output.
        frequency_penalty: taken from them once for each time.
        stop: texts that end the output; they are not part of it.
        stop_token_ids: tokens that end it, beside the model's own.
        ignore_eos: go on past the model's end of sequence.
        logprobs: log-probabilities of the chosen token and of so many likeliest ones; None: of none.
        seed: of this request's random numbers; None draws one.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        check_count("max_tokens", self.max_tokens, 1)
        check("temperature", self.temperature, 0 <= self.temperature < math.inf, "a finite number from 0")
        object.__setattr__(self, "temperature", self.temperature if self.temperature > COLD else 0.0)
        check_count("top_k", self.top_k, 0)
        check("top_k", self.top_k, self.top_k <= MOST_K, f"0 to {MOST_K}")
        check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, getattr(self, name), -2 <= getattr(self, name) <= 2, "-2 to 2")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RankwiseError("stop", list(self.stop), "texts of at least one character")
        if self.logprobs is not None:
            check_count("logprobs", self.logprobs, 0)
            check("logprobs", self.logprobs, self.logprobs <= 20, "0 to 20, or None")
        if self.seed is not None:
            check_count("seed", self.seed, -SEEDS)
            check("seed", self.seed, self.seed < SEEDS, "a whole number of 64 bits, or None")

    @property
    def fixed(self) -> bool:
        """Whether its tokens must come out alike every time: taken by size, or drawn with a seed."""
        return self.temperature == 0 or self.seed is not None

    @property
    def penalised(self) -> bool:
        """Whether seen tokens matter."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class Logprob:
    """Log-probabilities of one place.

    Args:
        chosen: of the token that was taken.
        top: token to log-probability, the likeliest first.
    """

    chosen: float
    top: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """One finished request.

    Args:
        prompt_tokens: ids of the prompt.
        tokens: ids of the output, its end of sequence counted.
        text: the output without special tokens, cut before a stop text.
        finish_reason: `stop`, `length` or `cancelled`.
        logprobs: per token, if asked for.
        cached_tokens: tokens of the prompt whose keys and values were there already.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str
    logprobs: list[Logprob] | None = None
    cached_tokens: int = 0
