"""bench/zeroshot.py: a line a model, measured once; its table."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import RankwiseError

BENCH = Path(__file__).parent.parent / "bench"


def script(name: str) -> Any:
    """A module of bench/."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, question in {"piqa": "Make {}", "winogrande": "The _ makes {}"}.items():
        rows = [{"question": question.format(i), "choices": ["tea", "a lot of it"], "answer": i % 2} for i in range(4)]
        (tmp_path / "tasks" / name).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "tasks" / name / "validation.jsonl").write_text(text)
    return tmp_path / "tasks"


def test_lines_are_measured_once(
    folder: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    zeroshot, out = script("zeroshot"), tmp_path / "rows.jsonl"
    measured: list[str] = []
    measure = zeroshot.measure

    def counted(source: str, *rest: Any) -> dict[str, Any]:
        measured.append(Path(source).name)
        return dict(measure(source, *rest))

    def run(*pairs: str, limit: int = 3) -> list[dict[str, Any]]:
        options = [
            "--tasks-folder",
            str(folder),
            "--tasks",
            "piqa,winogrande",
            "--limit",
            str(limit),
            "--out",
            str(out),
        ]
        monkeypatch.setattr(sys, "argv", ["zeroshot.py", *options, "--checkpoints", *pairs])
        zeroshot.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    monkeypatch.setattr(zeroshot, "measure", counted)
    first, second = f"a={model_folder('llama')}", f"b={model_folder('qwen2')}"
    rows = run(first)
    assert [row["name"] for row in rows] == ["a"]
    assert rows[0]["scores"]["piqa"]["questions"] == 3
    assert rows[0]["mean"].keys() == rows[0]["scores"]["piqa"].keys() & {"acc", "acc_norm"}
    assert str(tmp_path) not in out.read_text()
    assert run(first, second)[0] == rows[0]
    assert measured == ["llama", "qwen2"]
    rows = run(f"a={model_folder('qwen2')}")  # the name has other weights now
    assert [(row["name"], row["weights"]) for row in rows] == [("b", rows[1]["weights"]), ("a", rows[0]["weights"])]
    with pytest.raises(RankwiseError, match="is of another run; another --out, or remove it"):
        run(first, limit=2)


def test_table(
    folder: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bench import sheet, tables

    zeroshot = script("zeroshot")
    monkeypatch.setattr(sheet, "RESULTS", tmp_path)
    assert not tables.measured("zeroshot")
    options = ["--tasks-folder", str(folder), "--tasks", "piqa,winogrande"]
    checkpoints = ["--checkpoints", f"dense={model_folder('llama')}"]
    file = tmp_path / "cpu" / "zeroshot.jsonl"
    monkeypatch.setattr(sys, "argv", ["zeroshot.py", *options, *checkpoints, "--out", str(file)])
    zeroshot.main()
    assert tables.measured("zeroshot")
    head, rule, line, *rest = tables.zeroshot().splitlines()
    assert head == "| model | kept | `piqa` | `winogrande` | mean | mean, normalised |"
    assert rule == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert re.fullmatch(r"\| dense \| 100% \|( \d+\.\d% \|){4}", line)
    assert "On all questions of each task" in rest[1]
    assert "lm_eval" in rest[1]
