"""Perplexity against size: marks where they belong, names that can be read."""

import random
from itertools import combinations

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from reports import texts

from rankwise.figures import DARK, LIGHT
from rankwise.report.points import is_wide, points, round_numbers, short_names


def crowd(count: int, seed: int) -> tuple[list[str], list[float], list[float]]:
    """Half of the models close to one another, half anywhere."""
    draw = random.Random(seed)
    spread = [0.02 if number % 2 else 1.0 for number in range(count)]
    sizes = [2e9 + 1e9 * draw.uniform(-s, s) for s in spread]
    values = [20 + 10 * draw.uniform(-s, s) for s in spread]
    return [f"runs/model-{number}" for number in range(count)], sizes, values


def names_of(figure: Figure) -> list[Annotation]:
    return [text for text in texts(figure) if isinstance(text, Annotation)]


@pytest.mark.parametrize(("count", "seed"), [(3, 0), (6, 1), (10, 2)])
def test_names_stand_apart_and_inside(count: int, seed: int) -> None:
    figure = points(*crowd(count, seed), True, LIGHT)
    found = names_of(figure)
    assert sorted(text.get_text() for text in found) == sorted(f"model-{number}" for number in range(count))
    room = figure.axes[0].get_window_extent()
    boxes = [text.get_window_extent() for text in found]
    for box in boxes:
        assert room.x0 <= box.x0 < box.x1 <= room.x1
        assert room.y0 <= box.y0 < box.y1 <= room.y1
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_models_in_one_place_all_keep_their_names() -> None:
    figure = points(["dense", "a/x", "b/x"], [269e6] * 3, [22.9] * 3, True, DARK)
    found = {text.get_text(): text.get_window_extent() for text in names_of(figure)}
    assert set(found) == {"dense", "a/x", "b/x"}
    assert not any(one.overlaps(other) for one, other in combinations(found.values(), 2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[1.0, 1e304, 50.0], [20.0, 20.0, 81.0], [20.0, 20.0, 20.1], [0.0, 5.0, 9.0]])
def test_any_numbers_can_be_drawn(values: list[float]) -> None:
    figure = points(["d" * 60, "$x$\n", "c"], [1e3, 16e9, 5e6], values, True, LIGHT)
    for text in texts(figure):
        assert text.get_window_extent().x0 >= 0, text.get_text()
        assert text.get_window_extent().x1 <= figure.bbox.x1, text.get_text()
    assert figure.axes[0].get_xlabel() == "Size of the weights, GB"


def test_last_parts_of_paths_unless_they_are_the_same() -> None:
    assert short_names(["org/model", "runs/a/int4", "runs/b/int4"]) == ["model", "runs/a/int4", "runs/b/int4"]
    assert short_names(["small/", "embedded:x", "/"]) == ["small", "embedded:x", "/"]


def test_scale_is_logarithmic_from_a_factor_of_four() -> None:
    assert is_wide([20.0, 80.0])
    assert not is_wide([20.0, 79.0])
    assert not is_wide([0.0, 80.0])


@pytest.mark.parametrize("ends", [(18.0, 90.0), (1.0, 1e6), (2.5, 11.0), (1e-48, 1e304)])
def test_ticks_are_round_and_few(ends: tuple[float, float]) -> None:
    found = round_numbers(*ends)
    assert 3 <= len(found) <= 9
    assert all(ends[0] <= value <= ends[1] for value in found)
    assert all(float(f"{value:.0e}") == pytest.approx(value) for value in found)  # one digit, then noughts
