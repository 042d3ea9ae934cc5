"""Numbers as the page writes them."""

import pytest

from rankwise.report.formats import share


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8, "80.0%"),
        (1.0, "100.0%"),
        (0.99994, "99.99%"),
        (0.999999, "99.99%"),
        (0.9994, "99.9%"),
        (None, "not measured"),
    ],
)
def test_share_never_rounds_a_loss_away(value: float | None, text: str) -> None:
    assert share(value) == text
