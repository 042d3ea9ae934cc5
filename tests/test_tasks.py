"""Accuracy equals log-likelihoods put together by hand; the command prints it; bad input is one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import pytest
import torch

from rankwise.errors import RankwiseError
from rankwise.tasks import accuracy, load_tasks, mean_accuracy, measurer

WORDS = [
    "object",
    "value",
    "name",
    "class",
    "module",
    "function",
    "list",
    "string",
    "import",
    "error",
    "type",
    "method",
]
WORDS += ["key", "index", "float"]
COUNT = 24


def rows_of(name: str) -> list[dict[str, Any]]:
    """Questions without sense, every one different, with choices of different lengths."""
    rows = []
    for i in range(COUNT):
        word = [WORDS[(i * step + step) % len(WORDS)] for step in (1, 2, 4, 7)]
        choices = [f"the {word[0]}", f"a {word[1]} and another {word[2]}", f"no {word[3]} of that kind at all"]
        row: dict[str, Any] = {"question": f"Which {word[2]} has {word[3]} {i}", "choices": choices, "answer": i % 3}
        if name == "boolq":
            row |= {"passage": f"Every {word[0]} has {i}.", "choices": ["no", "yes"], "answer": i % 2}
        if name == "winogrande":
            row |= {"question": f"The {word[0]} met a {word[1]} as _ was {i}.", "choices": word[:2], "answer": i % 2}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in files."""
    top = tmp_path_factory.mktemp("questions")
    for name, split in {"ARC-Easy": "test", "boolq": "validation", "winogrande": "validation"}.items():
        (top / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows_of(name))
        (top / name / f"{split}.jsonl").write_text(text)
    return top


def nats(model: Any, tokenizer: Any, context: str, ending: str) -> float:
    """Log-likelihood of an ending after a context."""
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + ending)["input_ids"]
    scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids)))


def pairs(name: str, row: dict[str, Any]) -> list[tuple[str, str]]:
    """Context and ending of every choice, by hand."""
    if name == "winogrande":  # partial: the choice is in the context, what follows the blank is scored
        before, after = row["question"].split("_")
        return [(before + choice, " " + after.strip()) for choice in row["choices"]]
    passage = f"{row['passage']}\n" if name == "boolq" else ""
    mark = "?" if name == "boolq" else ""
    return [(f"{passage}Question: {row['question']}{mark}\nAnswer:", f" {choice}") for choice in row["choices"]]


def right(model: Any, tokenizer: Any, name: str, *, per_character: bool) -> list[float]:
    """1 for every question whose right answer wins."""
    found = []
    for row in rows_of(name):
        values = [nats(model, tokenizer, *pair) for pair in pairs(name, row)]
        if per_character:
            values = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
        found.append(float(values.index(max(values)) == row["answer"]))
    return found


@pytest.mark.parametrize("name", ["arc_easy", "boolq", "winogrande"])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_log_likelihoods_by_hand(
    name: str, seed: int, folder: Path, tiny: Callable[..., Any], tokenizer: Any
) -> None:
    model = tiny("llama", seed=seed)
    score = accuracy(model, tokenizer, [name], folder=folder)[name]
    plain = right(model, tokenizer, name, per_character=False)
    assert score["acc"] == pytest.approx(fmean(plain))
    assert score["acc_stderr"] == pytest.approx(stdev(plain) / COUNT**0.5)
    assert (score["questions"], score["truncated"]) == (COUNT, 0)
    if name == "arc_easy":
        normed = right(model, tokenizer, name, per_character=True)
        assert score["acc_norm"] == pytest.approx(fmean(normed))
        assert score["acc_norm_stderr"] == pytest.approx(stdev(normed) / COUNT**0.5)
        assert normed != plain
    else:
        assert "acc_norm" not in score


def test_tasks_that_were_loaded_measure_several_models(folder: Path, tiny: Callable[..., Any], tokenizer: Any) -> None:
    tasks = load_tasks(["winogrande", "arc_easy"], folder=folder, limit=5)
    for seed in (0, 1):
        model = tiny("llama", seed=seed)
        scores = accuracy(model, tokenizer, tasks, batch_size=3)
        assert list(scores) == ["winogrande", "arc_easy"]
        assert {score["questions"] for score in scores.values()} == {5}
        for name, score in scores.items():
            assert score["acc"] == pytest.approx(fmean(right(model, tokenizer, name, per_character=False)[:5]))
        assert accuracy(model, tokenizer, ["winogrande", "arc_easy"], folder=folder, limit=5) == scores
    assert accuracy(model, tokenizer, tasks, limit=1)["arc_easy"]["acc_stderr"] is None


def test_means(folder: Path, tiny: Callable[..., Any], tokenizer: Any) -> None:
    found = measurer("arc_easy, boolq,arc_easy", folder, None)(tiny("llama"), tokenizer)
    arc, boolq = found["tasks"]["arc_easy"], found["tasks"]["boolq"]
    assert found["accuracy"] == pytest.approx((arc["acc"] + boolq["acc"]) / 2)
    assert found["accuracy_norm"] == pytest.approx((arc["acc_norm"] + boolq["acc"]) / 2)
    assert mean_accuracy(found["tasks"]) == {"acc": found["accuracy"], "acc_norm": found["accuracy_norm"]}


def test_a_library_call_prints_nothing_and_leaves_the_tokenizer(
    folder: Path, tiny: Callable[..., Any], tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer.pad_token = None
    try:
        accuracy(tiny("llama"), tokenizer, ["arc_easy"], folder=folder, limit=2)
        assert tokenizer.pad_token is None
    finally:
        tokenizer.pad_token = "</s>"
    assert capfd.readouterr() == ("", "")


def test_prompts_longer_than_the_context_are_counted(tmp_path: Path, tiny: Callable[..., Any], tokenizer: Any) -> None:
    (tmp_path / "piqa").mkdir()
    row = {"question": "A name " * 80, "choices": ["one", "two"], "answer": 0}
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(row))
    assert accuracy(tiny("llama"), tokenizer, ["piqa"], folder=tmp_path)["piqa"]["truncated"] == 2


def test_names_of_the_hub(tiny: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> datasets.DatasetDict:
        asked.append((path, name))
        rows = [
            {"sentence": row["question"], "answer": str(row["answer"] + 1)}
            | {"option1": row["choices"][0], "option2": row["choices"][1]}
            for row in rows_of("winogrande")
        ]
        part = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict({"train": part, "validation": part})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    model = tiny("llama")
    score = accuracy(model, tokenizer, ["winogrande"], limit=7)["winogrande"]
    assert asked == [("allenai/winogrande", "winogrande_xl")]
    assert (score["questions"], score["acc"]) == (
        7,
        pytest.approx(fmean(right(model, tokenizer, "winogrande", per_character=False)[:7])),
    )

    def unreachable(path: str, name: str | None, **options: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(RankwiseError, match=r"tasks: boolq \(ConnectionError: .*the hub must be reachable"):
        load_tasks(["boolq"])


def test_names_that_lm_eval_lacks(folder: Path) -> None:
    with pytest.raises(RankwiseError, match="tasks: copa; allowed: arc_challenge, arc_easy, boolq, hellaswag"):
        load_tasks(["arc_easy", "copa"], folder=folder)
    with pytest.raises(RankwiseError, match=r"tasks: arc_esy; allowed: .*arc_easy"):
        load_tasks(["arc_esy"])
    with pytest.raises(RankwiseError, match="names with commas between them"):
        load_tasks(["arc_easy", ""], folder=folder)


@pytest.mark.parametrize("limit", [0, -1, 2.5, True])
def test_limits(limit: Any, folder: Path) -> None:
    with pytest.raises(RankwiseError, match=f"limit: {limit}; allowed: a whole number from 1"):
        load_tasks(["arc_easy"], folder=folder, limit=limit)


def test_without_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(RankwiseError, match=r"pip install 'rankwise\[tasks\]'"):
        load_tasks(["arc_easy"], folder=folder)


# ------------------------------------------------------------------------------------------------- the command


def test_eval_prints_both_models(
    folder: Path, model_folder: Callable[[str], Path], text_file: Path, run: Callable[..., tuple[str, str]]
) -> None:
    models = [model_folder("llama"), "--against", model_folder("qwen2")]
    text = ["--text", text_file, "--windows", "2", "--seq-len", "32"]
    tasks = ["--tasks", "arc_easy,winogrande", "--tasks-folder", folder, "--limit", "6"]
    out, err = run("eval", *models, *text, *tasks, "--json")
    facts = json.loads(out)
    for row in (facts, facts["against"]):
        assert row["perplexity"] > 1
        assert row["tasks"]["arc_easy"].keys() >= {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "questions"}
        assert {score["questions"] for score in row["tasks"].values()} == {6}
        assert row["accuracy"] == pytest.approx(fmean(score["acc"] for score in row["tasks"].values()))
    lines = [line for line in err.splitlines() if "arc_easy" in line or "winogrande" in line]
    assert [("llama" in line, "qwen2" in line) for line in lines] == [(True, False), (False, True)] * 2
    assert "mean acc" in err
    assert "perplexity" in err
    assert "it/s" not in err  # no bar of lm-eval's


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--tasks", "arc_esy", "--tasks-folder", "."], "error: tasks: arc_esy; allowed: arc_challenge"),
        (["--tasks", "arc_easy", "--tasks-folder", "./none"], "error: tasks_folder: none (no such folder)"),
        (["--tasks", "arc_easy", "--limit", "0"], "error: limit: 0; allowed: a whole number from 1"),
        (["--tasks", ""], "error: tasks: ; names with commas"),
        (["--limit", "5"], "error: limit: 5; allowed: only beside --tasks"),
        (["--tasks-folder", "."], "error: tasks_folder: .; allowed: only beside --tasks"),
    ],
)
def test_bad_input_is_one_line_before_any_model_is_read(
    options: list[str], what: str, run: Callable[..., tuple[str, str]]
) -> None:
    out, err = run("eval", "./no-model", *options, code=2)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(what)
