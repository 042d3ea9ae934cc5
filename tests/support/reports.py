"""A plan, rows and a parser of pages, for the tests of the report."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from rankwise.plan import LayerSpec, RankPlan

VOID = {"meta", "link", "img", "source", "br", "hr"}
EVIL = "<script>alert(1)</script>"
TEXT = "WikiText-2 test, 16 windows of 1024 tokens, bf16"
DENSE = {
    "name": "base",
    "ratio": 1.0,
    "weight_bytes": 269_060_552,
    "perplexity": 22.88,
    "text": TEXT,
    "prefill_ms_p50": 812.41,
    "prefill_ms_p95": 861.0,
    "decode_ms_p50": 38.2,
    "decode_ms_p95": 44.9,
    "tokens_per_s": 26.2,
    "peak_bytes": 912_000_000,
    "device": "CPU, 2 threads",
    "batch": 1,
    "prompt": 128,
    "versions": {"torch": "2.9"},
}


class Page(HTMLParser):
    """Tags, attributes, text and tables of a page; unbalanced tags fail."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.styles: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles.append(data)
        elif data.strip():
            self.text.append(data.strip())
            if {"td", "th"} & set(self.open):
                row = self.tables[-1][-1]
                row[-1] = f"{row[-1]} {data.strip()}".strip()

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name))]


def make_plan(**changes: Any) -> RankPlan:
    layers = {
        "model.layers.0.self_attn.q_proj": LayerSpec("pivot", 64, 64, 32, energy=0.9, loss=1.5e-3),
        "model.layers.0.mlp.up_proj": LayerSpec("dense", 128, 64, 64, energy=1.0, loss=0.0),
        "model.layers.1.self_attn.q_proj": LayerSpec("lowrank", 64, 64, 16, energy=0.99996, loss=2.5e-4),
        "model.layers.1.mlp.up_proj": LayerSpec("pivot", 128, 64, 40, energy=0.95, loss=None),
    }
    provenance = {"model": "embedded:tiny", "options": {"method": "global", "kinds": ["dense", "pivot"]}, "seed": 0}
    return RankPlan(**{"layers": layers, "provenance": provenance, **changes})


def make_rows(plan: RankPlan) -> list[dict[str, Any]]:
    changes = {"name": "small", "ratio": plan.ratio, "weight_bytes": 226_460_552, "perplexity": 26.41}
    return [DENSE, DENSE | changes | {"tokens_per_s": 30.2, "prefill_ms_p50": 731.1, "peak_bytes": 845_000_000}]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def texts(figure: Figure) -> list[Text]:
    """Every text that is drawn, laid out; ticks beyond an axis' end exist, but are not drawn."""
    FigureCanvasAgg(figure).draw()
    hidden = set()
    for axes in figure.axes:
        for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            hidden |= {label for value, label in ticks if not min(ends) <= value <= max(ends)}
    found = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text()]
    return [t for t in found if t not in hidden]


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio."""
    linear = [
        np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(x)])
        for x in (first, second)
    ]
    high, low = sorted((float(rgb @ [0.2126, 0.7152, 0.0722]) for rgb in linear), reverse=True)
    return (high + 0.05) / (low + 0.05)
