"""What is measured: who runs, which shapes, which load."""

import math
from dataclasses import dataclass, field

from rankwise.config import check, check_count, check_seed

MIX = ((128, 64), (512, 32), (32, 128))  # prompt and output tokens of requests under load
TTFT_LIMIT, TPOT_LIMIT = 2.0, 0.2  # seconds; a request that meets both counts as good


@dataclass(frozen=True)
class Contestant:
    """Who runs.

    Args:
        engine: a name of `rankwise.bench.lineup.ENGINES`.
        model: a hub id, a folder, a `.gguf` file or `embedded:smollm2-135m`.
    """

    engine: str
    model: str

    def __str__(self) -> str:
        return f"{self.engine}: {self.model}"


@dataclass(frozen=True)
class Load:
    """Requests that arrive at random times, independently of each other (a Poisson process).

    Args:
        rate: requests a second, on average.
        requests: of each round.
        mix: prompt and output tokens; every request draws one of them, all alike.
        ttft_limit: seconds to the first token of a good request.
        tpot_limit: seconds a further token of it, on average.
        seed: fixes arrivals, lengths and prompts.

    Raises:
        RankwiseError: a value is out of its range.
    """

    rate: float
    requests: int = 32
    mix: tuple[tuple[int, int], ...] = MIX
    ttft_limit: float = TTFT_LIMIT
    tpot_limit: float = TPOT_LIMIT
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "ttft_limit", "tpot_limit"):
            check("load" if name == "rate" else name, getattr(self, name), _positive(getattr(self, name)), "above 0")
        check_count("requests", self.requests, 2)
        check("mix", self.mix, bool(self.mix), "PROMPT:OUTPUT, at least one")
        for prompt, output in self.mix:
            check_count("mix", prompt, 1)
            check_count("mix", output, 2)
        check_seed(self.seed)

    @property
    def longest(self) -> int:
        """Tokens of its longest request."""
        return max(prompt + output for prompt, output in self.mix)


@dataclass(frozen=True)
class BenchConfig:
    """What is timed.

    Args:
        prompts: tokens of the prompts; each length is measured by itself.
        new_tokens: output tokens a sequence.
        batches: sequences side by side; each number is measured by itself.
        rounds: that count; one more, first, does not.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: as in `load_model`.
        load: arrivals to serve as well, or None.

    Raises:
        RankwiseError: a value is out of its range.
    """

    prompts: tuple[int, ...] = (128,)
    new_tokens: int = 32
    batches: tuple[int, ...] = (1,)
    rounds: int = 5
    device: str = "auto"
    dtype: str = "auto"
    load: Load | None = field(default=None)

    def __post_init__(self) -> None:
        check_count("new_tokens", self.new_tokens, 2)  # of one token there is no time between tokens
        check_count("rounds", self.rounds, 1)
        for name, values in (("prompt", self.prompts), ("batch", self.batches)):
            check(name, values, bool(values), "at least one")
            for value in values:
                check_count(name, value, 1)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Batch and prompt tokens of everything that is measured, without repetition."""
        return [(batch, prompt) for batch in dict.fromkeys(self.batches) for prompt in dict.fromkeys(self.prompts)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, its output included."""
        return max(max(self.prompts) + self.new_tokens, self.load.longest if self.load else 0)

    @property
    def together(self) -> int:
        """Sequences that an engine must be able to hold at once."""
        return max(*self.batches, 8 if self.load else 1)

    @property
    def cache_tokens(self) -> int:
        """Tokens that the keys and values of an engine must have room for, a block to spare for each sequence."""
        return self.together * (self.longest + 32)


def _positive(value: float) -> bool:
    return not isinstance(value, bool) and math.isfinite(value) and value > 0
