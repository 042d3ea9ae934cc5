"""What `rankwise serve` is told."""

import math
from dataclasses import dataclass, field

from rankwise.config import DTYPES, check, check_count

HOUR = 3600.0


@dataclass(frozen=True)
class ServeConfig:
    """A server's model, address and limits.

    Args:
        model: a hub id, a folder (dense or compressed), a `.gguf` file or `embedded:smollm2-135m`.
        host: address to listen on.
        port: likewise; 0 takes a free one.
        name: what clients call the model; None: `model` itself.
        api_key: that clients must send; None lets everybody in.
        max_queue: sequences that may wait beside the `max_sequences` that run.
        max_tokens: output tokens that a client may ask for; None: what the context leaves.
        max_body: bytes of a request.
        timeout: seconds a request may take, waiting included.
        grace: seconds that requests in flight get after SIGTERM or SIGINT.
        max_model_len: tokens of a sequence, its output included; None: what the model was made for, at most 8192.
        kv_tokens: tokens that the KV cache holds; None: what memory allows.
        max_sequences: that run at once.
        prefix_caching: prompts that begin alike share their keys and values.
        draft: a model with the same tokens that guesses ahead, usually a compressed checkpoint of `model`; None: none.
        draft_tokens: it guesses in a step.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.

    Raises:
        RankwiseError: a value is out of its range.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_queue: int = 256
    max_tokens: int | None = None
    max_body: int = 1 << 20
    timeout: float = 600.0
    grace: float = 30.0
    max_model_len: int | None = None
    kv_tokens: int | None = None
    max_sequences: int = 64
    prefix_caching: bool = True
    draft: str | None = None
    draft_tokens: int = 4
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_count("port", self.port, 0)
        check("port", self.port, self.port < 2**16, "0 to 65535")
        check("name", self.name, self.name is None or bool(self.name.strip()), "some text")
        usable = self.api_key is None or (
            self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key
        )
        check("api_key", "what was given", usable and self.api_key != "", "visible ASCII characters, one at least")
        check_count("max_queue", self.max_queue, 0)
        check_count("max_body", self.max_body, 1)
        check_count("max_sequences", self.max_sequences, 1)
        check_count("draft_tokens", self.draft_tokens, 1)
        for name in ("max_tokens", "kv_tokens", "max_model_len"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        for name, lowest in (("timeout", 0.001), ("grace", 0.0)):
            value = getattr(self, name)
            check(name, value, math.isfinite(value) and lowest <= value <= 24 * HOUR, f"{lowest:g} to {24 * HOUR:g} s")
        check("dtype", self.dtype, self.dtype in DTYPES, ", ".join(DTYPES))

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.name or self.model

    @property
    def capacity(self) -> int:
        """Sequences that are accepted at once."""
        return self.max_sequences + self.max_queue
