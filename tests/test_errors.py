"""The one exception that users see."""

from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import RankwiseError


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param("abc", "abc", id="text-bare"),
        pytest.param(3, "3", id="number"),
        pytest.param(None, "None", id="none"),
        pytest.param(Path("a"), repr(Path("a")), id="object-by-repr"),
        pytest.param("two\nlines  and\ttabs ", "two lines and tabs", id="text-on-one-line"),
    ],
)
def test_message_names_field_value_and_what_is_allowed(value: Any, shown: str) -> None:
    error = RankwiseError("ratio", value, "allowed: above 0")
    assert str(error) == f"ratio: {shown}; allowed: above 0"
    assert (error.field, error.value, error.allowed) == ("ratio", value, "allowed: above 0")


def test_callers_who_know_nothing_of_rankwise_catch_a_value_error() -> None:
    with pytest.raises(ValueError, match="seed: -1; a whole number"):
        raise RankwiseError("seed", -1, "a whole number")
