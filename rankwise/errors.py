"""The one exception that users see: field, value, what is allowed."""

from typing import Any


class RankwiseError(ValueError):
    """Input that rankwise cannot use. The command line prints it on one line and exits with 2.

    Args:
        field: the option, file, tensor or module that is at fault.
        value: what was found there.
        allowed: what would have been accepted, or what to do next.
    """

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        text = " ".join(str(value).split()) if isinstance(value, str) else repr(value)
        super().__init__(f"{field}: {text}; {allowed}")


def overflown() -> RankwiseError:
    """What a compressed model that gives NaN or Inf is refused with."""
    return RankwiseError("activations", "NaN or Inf in the compressed model", "try --dtype fp32 or bf16")
