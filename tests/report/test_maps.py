"""Maps over blocks and module types."""

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection, QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from reports import texts

from rankwise.figures import DARK, LIGHT, THEMES, Theme
from rankwise.plan import LayerSpec
from rankwise.report.maps import energy_map, limits, make_grid, parse_name, rank_map

THEME_IDS = [theme.name for theme in THEMES]


def small_layers() -> dict[str, LayerSpec]:
    """Two blocks; block 0 holds one module of each kind, block 1 lacks `mlp.up_proj`."""
    return {
        "model.layers.0.self_attn.q_proj": LayerSpec("pivot", 64, 64, 32, energy=0.9),
        "model.layers.0.self_attn.k_proj": LayerSpec("lowrank", 16, 64, 8, energy=0.6),
        "model.layers.0.mlp.up_proj": LayerSpec("dense", 128, 64, 64, energy=1.0),
        "model.layers.1.self_attn.q_proj": LayerSpec("pivot", 64, 64, 16, energy=None),
        "model.layers.1.self_attn.k_proj": LayerSpec("dense", 16, 64, 16, energy=1.0),
    }


def many_layers(blocks: int) -> dict[str, LayerSpec]:
    types = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
    return {
        f"model.layers.{block}.{kind}": LayerSpec("pivot", 64, 64, 1 + (7 * block + 3 * i) % 60)
        for block in range(blocks)
        for i, kind in enumerate(types)
    }


def only(figure: Figure, kind: type) -> list:
    """The collections of one kind on a map, the colour bar's left out."""
    return [c for c in figure.axes[0].collections if type(c) is kind]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.7.self_attn.q_proj", ("model.layers", 7, "self_attn.q_proj")),
        ("transformer.h.3.attn.c_attn", ("transformer.h", 3, "attn.c_attn")),
        ("model.decoder.layers.2.fc1", ("model.decoder.layers", 2, "fc1")),
        ("model.layers.12.moe.experts.5.w1", ("model.layers", 12, "moe.experts.5.w1")),
        ("0.q", ("", 0, "q")),
        ("model.layer3.fc1", None),
        ("model.layers.3", None),
        ("lm_head", None),
        ("", None),
    ],
)
def test_names_split_at_the_first_integer(name: str, expected: tuple[str, int, str] | None) -> None:
    assert parse_name(name) == expected


def test_grid_holds_each_module_in_its_cell() -> None:
    grid = make_grid(small_layers(), lambda spec: spec.ratio)
    assert grid.rows == ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]
    assert grid.columns == [0, 1]
    assert grid.values[0, 0] == pytest.approx(32 * (64 + 64 - 32) / 64**2)
    assert grid.values[1, 0] == pytest.approx(8 * (16 + 64) / (16 * 64))
    assert grid.values[0, 1] == pytest.approx(16 * (64 + 64 - 16) / 64**2)
    assert grid.values[2, 0] == 1.0
    assert np.isnan(grid.values[2, 1])
    assert grid.kinds.tolist() == [["pivot", "pivot"], ["lowrank", "dense"], ["dense", ""]]
    assert np.isnan(grid.shown).tolist() == [[False, False], [False, True], [True, True]]


@pytest.mark.parametrize(
    ("form", "kind"), [("transformer.h.{}.attn.c_attn", "attn.c_attn"), ("model.decoder.layers.{}.fc1", "fc1")]
)
def test_grid_of_other_families(form: str, kind: str) -> None:
    layers = {form.format(block): LayerSpec("lowrank", 64, 64, block) for block in (11, 2, 10)}
    layers["lm_head"] = LayerSpec("dense", 64, 64, 64)
    grid = make_grid(layers, lambda spec: float(spec.rank))
    assert (grid.rows, grid.columns) == ([kind], [2, 10, 11])
    assert grid.values.tolist() == [[2.0, 10.0, 11.0]]


def test_modules_of_two_stacks_do_not_share_a_cell() -> None:
    layers = {f"{stack}.0.fc": LayerSpec("lowrank", 64, 64, rank) for stack, rank in (("encoder", 3), ("decoder", 5))}
    grid = make_grid(layers, lambda spec: float(spec.rank))
    assert grid.values.tolist() == [[3.0], [5.0]]
    assert grid.rows == ["encoder.*.fc", "decoder.*.fc"]


def test_colours_span_all_values_unless_a_few_would_flatten_the_rest() -> None:
    even = np.linspace(0.4, 0.9, 100)
    assert limits(even) == pytest.approx((0.4, 0.9))
    assert limits(np.append(even, np.nan)) == pytest.approx((0.4, 0.9))
    low, high = limits(np.append(np.linspace(0.97, 0.99, 99), 0.1))
    assert low >= 0.97
    assert high == pytest.approx(0.99)
    low, high = limits(np.array([0.5]))
    assert low < 0.5 < high


@pytest.mark.parametrize("theme", THEMES, ids=THEME_IDS)
def test_map_draws_values_strokes_and_dots_where_they_belong(theme: Theme) -> None:
    grid = make_grid(small_layers(), lambda spec: spec.ratio)
    figure = rank_map(grid, theme)
    (mesh,) = only(figure, QuadMesh)
    drawn = np.ma.filled(mesh.get_array().astype(float), np.nan).reshape(3, 2)
    assert np.array_equal(drawn, grid.shown, equal_nan=True)
    (strokes,) = only(figure, LineCollection)
    centres = {tuple(np.floor(segment.mean(axis=0)).astype(int)) for segment in strokes.get_segments()}
    assert centres == {(1, 1), (0, 2)}  # (block, row) of the dense modules
    (dots,) = only(figure, PathCollection)
    assert dots.get_offsets().tolist() == [[0.5, 1.5]]
    assert to_rgb(theme.background) == figure.get_facecolor()[:3]


def test_no_dots_where_one_kind_rules() -> None:
    layers = {name: spec for name, spec in small_layers().items() if spec.kind != "pivot"}
    assert not only(rank_map(make_grid(layers, lambda spec: spec.ratio), LIGHT), PathCollection)


def test_map_of_a_model_left_dense_has_no_colours() -> None:
    layers = {f"model.layers.{b}.fc": LayerSpec("dense", 64, 64, 64) for b in range(3)}
    figure = rank_map(make_grid(layers, lambda spec: spec.ratio), LIGHT)
    assert len(figure.axes) == 1
    assert not only(figure, QuadMesh)
    assert len(only(figure, LineCollection)[0].get_segments()) == 3


def test_colour_bar_points_at_values_below_its_range() -> None:
    def energies(low: float) -> Figure:
        layers = {f"model.layers.{b}.fc": LayerSpec("pivot", 64, 64, 8, energy=0.97 + b / 5000) for b in range(60)}
        layers["model.layers.60.fc"] = LayerSpec("pivot", 64, 64, 8, energy=low)
        return energy_map(make_grid(layers, lambda spec: spec.energy), LIGHT)

    assert only(energies(0.1), QuadMesh)[0].colorbar.extend == "min"
    assert only(energies(0.98), QuadMesh)[0].colorbar.extend == "neither"


@pytest.mark.parametrize("blocks", [1, 12, 30, 80, 126])
def test_labels_of_a_map_neither_overlap_nor_leave_the_figure(blocks: int) -> None:
    figure = rank_map(make_grid(many_layers(blocks), lambda spec: spec.ratio), DARK)
    boxes = {t: t.get_window_extent() for t in texts(figure)}
    for box in boxes.values():
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    ordered = list(boxes.items())
    for i, (one, box) in enumerate(ordered):
        for other, second in ordered[i + 1 :]:
            assert not box.overlaps(second), (one.get_text(), other.get_text())
    ticks = [t for t in figure.axes[0].get_xticklabels() if t.get_text()]
    assert 1 <= len(ticks) <= 20
    for tick in ticks:
        assert int(tick.get_position()[0] - 0.5) == int(tick.get_text())
