"""Widths under a budget of bytes: what layers may become at each, and which widths are worth their bytes."""

from typing import Any

import numpy as np
import pytest
from spectra import MENU, drawn

import rankwise
from rankwise.alloc.joint import StoredChoices, Trust, joint_choices
from rankwise.alloc.narrow import byte_budget

METHOD = rankwise.Global(rank_multiple=8)


@pytest.fixture(scope="module")
def source() -> Any:
    return drawn(0)


def test_with_all_channels_a_layer_may_become_what_it_may_without_widths(source: Any) -> None:
    scores, table = source
    budget = byte_budget(METHOD, scores, table, MENU, 10_000, "bf16")
    assert (budget.target, budget.removal) == (10_000, Trust().rank)
    for name, expected in joint_choices(METHOD, scores, table, MENU, "bf16").items():
        found = budget.choose(name, scores.shapes[name], scores.energies[name])
        assert isinstance(found, StoredChoices)
        assert (found.kind, found.precision) == (expected.kind, expected.precision)
        for part in ("rank", "cost", "loss"):
            assert np.array_equal(getattr(found, part), getattr(expected, part))


def dense_at(entry: Any) -> dict[str, tuple[int, float]]:
    """Bytes and loss of the dense choices by precision."""
    parts = zip(entry.kind, entry.precision, entry.cost, entry.loss, strict=True)
    return {str(precision): (int(cost), float(loss)) for kind, precision, cost, loss in parts if kind == "dense"}


def test_a_narrower_layer_takes_fewer_bytes_and_rounding_costs_it_less(source: Any) -> None:
    scores, table = source
    budget = byte_budget(METHOD, scores, table, MENU, 10_000, "bf16")
    whole = dense_at(budget.choose("0.up", (704, 256), scores.energies["0.up"]))
    half = dense_at(budget.choose("0.up", (352, 256), scores.energies["0.up"] / 4))
    both = whole.keys() & half.keys()
    assert len(both) > 1
    for precision in both:
        assert half[precision][0] == pytest.approx(whole[precision][0] / 2, rel=0.02)
        assert half[precision][1] == pytest.approx(whole[precision][1] / 4)


def test_what_the_text_never_reached_is_rounded_as_dearly_as_ever(source: Any) -> None:
    scores, table = source
    budget = byte_budget(METHOD, scores, table, MENU, 10_000, "bf16")
    found = dense_at(budget.choose("0.up", (352, 256), np.full(256, np.inf)))
    assert len(found) > 1
    for precision in MENU[1:]:
        if str(precision) in found:
            expected = Trust().rounding * table.loss("0.up", "dense", np.array([256]), precision)[0]
            assert found[str(precision)][1] == pytest.approx(expected)
