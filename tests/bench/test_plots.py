"""Files: a line a row, and figures that open."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from rankwise.bench.plots import draw_shapes, write_results
from rankwise.console import speed_tables
from rankwise.figures import LIGHT


def row(engine: str, factor: float, **more: Any) -> dict[str, Any]:
    times = {f"{key}_ms_p{share}": factor * share for key in ("ttft", "tpot", "e2e") for share in (50, 95, 99)}
    spreads = {"tokens_per_s": [8 / factor, 10 / factor, 12 / factor], "mbu_percent": [40.0, 50.0, 60.0]}
    against = {key: [0.9 * factor, factor, 1.1 * factor] for key in ("ttft", "tpot", "tokens_per_s", "e2e")}
    bytes_ = {"weight_memory_bytes": 3 * 10**6, "kv_bytes": 10**6, "peak_bytes": 5 * 10**6}
    who = {"name": "$x_1", "engine": engine, "ratio": 1.0, "dtype": "fp32", "device": "CPU", "rounds": 2}
    return {**who, "new_tokens": 4, **times, **spreads, "vs_first": against, **bytes_, **more}


@pytest.fixture
def found() -> dict[str, Any]:
    shapes = [{"batch": batch, "prompt": 8} for batch in (1, 16)]
    load = {"rate": 2.0, "requests": 4, "mix": ((8, 4),), "ttft_limit": 2.0, "tpot_limit": 0.2, "good_share": 0.5}
    load["goodput_per_s"] = [0.5, 1.0, 1.5]
    rows = [row(engine, factor, **shape) for shape in shapes for engine, factor in (("rankwise", 1), ("vllm", 2))]
    return {"rows": rows, "load": [row("rankwise", 1, **load)], "bandwidth_bytes_per_s": [1e9, 2e9, 3e9]}


def test_lines_and_figures(found: dict[str, Any], tmp_path: Path) -> None:
    write_results(found, tmp_path / "new" / "out")
    lines = [json.loads(line) for line in (tmp_path / "new" / "out" / "bench.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["batch"] * 4 + ["load"]
    assert lines[0] | found["rows"][0] == lines[0]
    assert lines[0]["bandwidth_bytes_per_s"] == [1e9, 2e9, 3e9]
    names = {"ttft", "tpot", "tokens", "bandwidth", "load-ttft", "load-tpot", "load-e2e"}
    pictures = {path.stem: imread(path) for path in (tmp_path / "new" / "out").glob("*.png")}
    assert pictures.keys() == names
    assert all(picture.std() > 0.01 for picture in pictures.values())


def test_bars_are_the_medians(found: dict[str, Any]) -> None:
    axes = draw_shapes("title", found["rows"], "tokens_per_s", None, LIGHT).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [10, 5, 10, 5]
    axes = draw_shapes("title", found["rows"], "ttft_ms_p50", "ttft_ms_p95", LIGHT).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [50, 100, 50, 100]


def test_tables_say_what_was_measured(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    speed_tables(found)
    said = capsys.readouterr().err
    assert "memory gives 1.0–3.0 GB/s" in said
    assert "batch 16, prompt 8, 4 new tokens" in said
    assert "100.0 / 190.0 / 198.0" in said
    assert "2.00 (1.80–2.20)" in said
    assert "4 requests a round at 2/s, prompt:output 8:4; good: first token within 2 s" in said
