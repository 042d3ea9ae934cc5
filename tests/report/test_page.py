"""The page: what stands in it, what it loads, what is refused."""

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reports import DENSE, EVIL, TEXT, make_plan, make_rows, read

import rankwise
from rankwise.errors import RankwiseError
from rankwise.figures import DARK, LIGHT
from rankwise.plan import LayerSpec, RankPlan
from rankwise.report import write_report
from rankwise.report.pictures import bar_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "a" / "page"
    plan = make_plan(other_bytes=5_000_000)
    assert write_report(plan, make_rows(plan), folder, title="Tiny, half kept") == folder / "index.html"
    return folder


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out, which take most of the time."""
    monkeypatch.setattr("rankwise.report.page.map_pictures", lambda plan: [])
    monkeypatch.setattr("rankwise.report.page.bar_pictures", lambda rows: [])
    monkeypatch.setattr("rankwise.report.page.tradeoff_pictures", lambda rows: [])


def test_folder_holds_the_page_and_each_figure_twice(folder: Path) -> None:
    names = ("rank_map", "energy_map", "perplexity", "size", "decode", "prefill")
    files = {"index.html", *(f"{name}-{theme}.png" for name in names for theme in ("light", "dark"))}
    assert {path.name for path in folder.iterdir()} == files
    assert [path.name for path in folder.parent.iterdir()] == ["page"]
    assert folder.stat().st_mode & 0o777 == 0o755
    for name in names:
        light, dark = (Image.open(folder / f"{name}-{theme}.png").convert("RGB") for theme in ("light", "dark"))
        assert light.size == dark.size
        assert min(light.size) > 200
        for image, theme in ((light, LIGHT), (dark, DARK)):
            assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((0, 0))) == theme.background
        assert np.asarray(light).std() > 5


def test_page_embeds_the_very_files_with_alternatives(folder: Path) -> None:
    page = read(folder / "index.html")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    sources = [attributes for tag, attributes in page.tags if tag == "source"]
    assert len(images) == len(sources) == 6
    links = [link for link in page.attributes("href") if link.endswith(".png")]
    assert len(links) == 12
    embedded = [image["src"] for image in images] + [source["srcset"] for source in sources]
    contents = {base64.b64decode(str(uri).removeprefix("data:image/png;base64,")) for uri in embedded}
    assert contents == {(folder / link).read_bytes() for link in links}
    for image in images:
        assert len(str(image["alt"])) > 40
        raw = base64.b64decode(str(image["src"]).partition(",")[2])
        assert Image.open(io.BytesIO(raw)).size == (int(str(image["width"])), int(str(image["height"])))
    assert {source["media"] for source in sources} == {"(prefers-color-scheme: dark)"}


def test_page_loads_nothing_from_elsewhere(folder: Path) -> None:
    page = read(folder / "index.html")
    loads = [v for name in ("src", "srcset", "href", "data", "action", "poster") for v in page.attributes(name)]
    for value in loads:
        assert value.startswith("data:") or (folder / value).is_file(), value
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    css = "".join(page.styles)
    assert "url(" not in css
    assert "@import" not in css
    assert "http" not in css
    assert any("default-src 'none'" in value for value in page.attributes("content"))


def test_headline_and_summary_state_what_was_measured(folder: Path) -> None:
    page = read(folder / "index.html")
    facts = page.text[page.text.index("Linear parameters kept") :][:8]
    kept = make_plan().ratio
    assert facts[:3] == ["Linear parameters kept", f"{kept:.1%}", "modules: 1 dense, 1 lowrank, 2 pivot"]
    assert facts[3:6] == ["Perplexity", "22.88 → 26.41", "+15.4%"]
    assert facts[6:8] == ["Size", "269.1 MB → 226.5 MB"]
    heading, dense, small = page.tables[0]
    cells = dict(zip(heading, small, strict=True))
    assert cells["Model"] == "small"
    assert cells["Size"] == "226.5 MB −15.8%"
    assert cells["Decode, tokens/s"] == "30.20 +15.3%"
    assert cells["Prefill latency"] == "731.1 ms −10.0% p95 861.0 ms"
    assert dict(zip(heading, dense, strict=True))["Perplexity"] == "22.88"
    note = next(text for text in page.text if text.startswith("Changes are"))
    assert f"Perplexity: measured on {TEXT}." in note
    assert "Speed and memory: measured on CPU, 2 threads, prompt of 128 tokens, batch 1." in note
    assert page.text[-1] == f"rankwise {rankwise.__version__}"


def test_every_module_and_the_provenance_are_listed(folder: Path) -> None:
    page = read(folder / "index.html")
    _, *rows, total = page.tables[1]
    plan = make_plan()
    assert [row[0] for row in rows] == list(plan.layers)
    assert rows[0][1:] == ["pivot", "32 of 64", "75.0%", "90.0%", "1.50e-03", "0.01"]
    assert rows[1][4:6] == ["100.0%", "0"]
    assert rows[2][4] == "99.99%"  # rounding up would claim that nothing was lost
    assert rows[3][5] == "not measured"
    assert total[3:] == [f"{plan.ratio:.1%}", "", "not measured", f"{plan.bytes / 1e6:.2f}"]
    assert any("Everything else in the checkpoint: 5.00 MB" in text for text in page.text)
    assert page.tables[2:] == [
        [["model", "embedded:tiny"], ["seed", "0"]],
        [["method", "global"], ["kinds", "dense, pivot"]],
    ]


def test_what_is_missing_is_not_measured_and_has_no_figure(tmp_path: Path) -> None:
    layers = {name: LayerSpec(s.kind, s.out_features, s.in_features, s.rank) for name, s in make_plan()}
    path = write_report(make_plan(layers=layers, provenance={}), [{"name": "base"}, {}], tmp_path / "r", title="t")
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "rank_map-light.png", "rank_map-dark.png"}
    page = read(path)
    for row, name in zip(page.tables[0][1:], ("base", "unnamed"), strict=True):
        assert row == [name] + ["not measured"] * 7
    assert page.text[page.text.index("Perplexity") + 1] == "not measured"
    assert all(row[4:6] == ["not measured"] * 2 for row in page.tables[1][1:-1])
    assert "The plan records none." in page.text


def test_one_number_alone_makes_no_figure_and_no_change(tmp_path: Path, bare: None) -> None:
    rows = [{"name": "base", "perplexity": 20.0}, {"name": "small", "perplexity": None, "tokens_per_s": 5.0}]
    assert bar_pictures(rows) == []
    page = read(write_report(make_plan(), rows, tmp_path / "r", title="t"))
    assert "20.00 → not measured" in page.text
    assert "%" not in "".join(page.tables[0][2])


def test_headline_belongs_to_the_row_that_the_plan_made(tmp_path: Path, bare: None) -> None:
    plan = make_plan()
    base, small = make_rows(plan)
    other = small | {"name": "rival", "ratio": plan.ratio + 1e-4, "perplexity": 99.0}
    page = read(write_report(plan, [base, other, small], tmp_path / "three", title="t"))
    assert "22.88 → 26.41" in page.text
    page = read(write_report(plan, [base, other, other], tmp_path / "unclear", title="t"))
    assert not any("→" in text for text in page.text)
    twin = small | {"name": "twin", "perplexity": 88.0}
    page = read(write_report(plan, [base, twin, small], tmp_path / "told", title="t", made=2))
    assert "22.88 → 26.41" in page.text
    with pytest.raises(RankwiseError, match="made: 3"):
        write_report(plan, [base, twin, small], tmp_path / "beyond", title="t", made=3)
    page = read(write_report(plan, [small], tmp_path / "alone", title="t"))
    assert page.text[page.text.index("Perplexity") + 1] == "26.41"
    page = read(write_report(plan, [], tmp_path / "none", title="t"))
    assert "No model was measured." in page.text


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    name = f"model.layers.0.{EVIL}"
    layers = {name: LayerSpec("pivot", 64, 64, 8, energy=0.5), f"model.layers.1.{EVIL}": LayerSpec("dense", 8, 8, 8)}
    plan = make_plan(layers=layers, provenance={EVIL: {EVIL: [EVIL], "\"'>": None}})
    rows = [{"name": EVIL, "text": EVIL, "perplexity": 1.0, "device": '"><img src=x onerror=alert(1)>'}] * 2
    path = write_report(plan, rows, tmp_path / "r", title=f"{EVIL} \ud800")
    page = read(path)
    assert "<script" not in path.read_text(encoding="utf-8")
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert f"{EVIL} ?" in page.text
    assert page.tables[0][1][0] == EVIL
    assert page.tables[1][1][0] == name
    assert page.tables[2] == [[EVIL, EVIL], ["\"'>", "null"]]
    assert any(EVIL in alt for alt in page.attributes("alt"))


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_exists_is_left_untouched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "r"
    if kind == "folder":
        target.mkdir()
        (target / "keep").write_text("mine")
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(RankwiseError, match="does not exist yet"):
        write_report(make_plan(), [], target, title="t")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert kind != "folder" or (target / "keep").read_text() == "mine"


def test_failure_leaves_no_trace(tmp_path: Path, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr("rankwise.report.page.publish", refuse)
    with pytest.raises(RankwiseError, match="Input/output error"):
        write_report(make_plan(), [], tmp_path / "r", title="t")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RankwiseError, match="folder"):
        write_report(make_plan(), [], tmp_path / "file" / "r", title="t")


def test_three_models_have_a_tradeoff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.report.page.map_pictures", lambda plan: [])
    monkeypatch.setattr("rankwise.report.page.bar_pictures", lambda rows: [])
    plan = make_plan(provenance={"candidates": [{"of": EVIL, "predicted": 0.5, "measured": None}]})
    rows = [*make_rows(plan), DENSE | {"name": EVIL, "weight_bytes": 9e7}]
    page = read(write_report(plan, rows, tmp_path / "r", title="t"))
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "index.html",
        "tradeoff-light.png",
        "tradeoff-dark.png",
    }
    assert f"{EVIL}: 90.0 MB, 22.88." in page.attributes("alt")[0]
    assert page.tables[0][3][0] == EVIL
    assert page.tables[2] == [[EVIL, "predicted 0.5, measured not known"]]


def test_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(other_bytes=5_000_000)
    write_report(plan, make_rows(plan), tmp_path / "again", title="Tiny, half kept")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"perplexity": "12"}, r"rows\[1\]\.perplexity"),
        ({"weight_bytes": True}, r"rows\[1\]\.weight_bytes"),
        ({"name": 3}, r"rows\[1\]\.name"),
    ],
)
def test_wrong_kinds_are_named(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    with pytest.raises(RankwiseError, match=field):
        write_report(make_plan(), [{}, row], tmp_path / "r", title="t")
    assert list(tmp_path.iterdir()) == []


def test_plans_edited_by_hand_are_checked(tmp_path: Path) -> None:
    data = make_plan().to_dict()
    data["layers"]["model.layers.0.mlp.up_proj"]["energy"] = "all"
    with pytest.raises(RankwiseError, match=r"model\.layers\.0\.mlp\.up_proj\.energy"):
        write_report(RankPlan.from_dict(data), [], tmp_path / "r", title="t")
    with pytest.raises(RankwiseError, match="no layers"):
        write_report(RankPlan({}), [], tmp_path / "r", title="t")


def test_numbers_beyond_measure_are_called_so(tmp_path: Path, bare: None) -> None:
    rows = [{"perplexity": 20.0, "weight_bytes": 16e9}, {"perplexity": float("inf"), "weight_bytes": 9.6e8}]
    page = read(write_report(make_plan(), rows, tmp_path / "r", title="t"))
    cells = dict(zip(page.tables[0][0], page.tables[0][2], strict=True))
    assert cells["Perplexity"] == "not finite"
    assert cells["Size"] == "0.96 GB −94.0%"
    assert not any(picture.name == "perplexity" for picture in bar_pictures(rows))


def test_precision_is_told_where_it_is_4_bits(tmp_path: Path) -> None:
    layers = {"model.layers.0.q": LayerSpec("pivot", 128, 128, 64, "int4", group=64, asymmetric=True)}
    layers["model.layers.0.k"] = LayerSpec("dense", 128, 128, 128, "nf4")
    plan = RankPlan(layers)
    page = write_report(plan, [], tmp_path / "report", title="4 bits").read_text()
    assert "<td>pivot, int4 by 64, asymmetric</td>" in page
    assert "<td>dense, nf4</td>" in page
    assert f"{plan.bits:.2f} bits for each number that was there" in page
