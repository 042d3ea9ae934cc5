"""Local rows become the prompts and choices of lm-eval's own tasks; bad rows are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import tasks as definitions

from rankwise.errors import RankwiseError
from rankwise.taskfiles import RECIPES, load_file_task, question_file

ARC = {"question": "What is wet?", "choices": ["fire", "water", "sand"], "answer": 1}
ROWS: dict[str, dict[str, Any]] = {
    "arc_challenge": ARC,
    "arc_easy": ARC,
    "boolq": {"question": "is water wet?", "choices": ["yes", "no"], "answer": 0, "passage": "Water is wet."},
    "hellaswag": {
        "question": "High jump: A boy runs.  Then he stops. the Boy",
        "choices": ["jumps [laughs] up.", " sits"],
        "answer": 1,
    },
    "mathqa": {"question": "1 + 1 ?", "choices": ["3", "1 , 000", "two", "nonE oF thEsE", "4 , 5"], "answer": 2},
    "openbookqa": {"question": "Wet is", "choices": ["water", "sand"], "answer": 0},
    "piqa": {"question": "Make tea.", "choices": ["Boil water. ", "Burn it."], "answer": 0},
    "winogrande": {"question": "Ann called Bea because _ was late.", "choices": ["Ann", "Bea"], "answer": 1},
}
ASKED: dict[str, tuple[list[tuple[str, str]], int]] = {  # (context, continuation) of every choice; the right one
    "arc_challenge": ([("Question: What is wet?\nAnswer:", f" {choice}") for choice in ("fire", "water", "sand")], 1),
    "arc_easy": ([("Question: What is wet?\nAnswer:", f" {choice}") for choice in ("fire", "water", "sand")], 1),
    "boolq": ([("Water is wet.\nQuestion: is water wet?\nAnswer:", f" {choice}") for choice in ("no", "yes")], 1),
    "hellaswag": ([("High jump: A boy runs. Then he stops. The boy", f" {c}") for c in ("jumps up.", "sits")], 1),
    "mathqa": ([("Question: 1 + 1 ?\nAnswer:", f" {c}") for c in ("3", "1", "two", "none of these", "4 , 5")], 2),
    "openbookqa": ([("Wet is", " water"), ("Wet is", " sand")], 0),
    "piqa": ([("Question: Make tea.\nAnswer:", " Boil water. "), ("Question: Make tea.\nAnswer:", " Burn it.")], 0),
    "winogrande": ([(f"Ann called Bea because {name}", " was late.") for name in ("Ann", "Bea")], 1),
}


def write(folder: Path, task: str, *rows: Any, file: str | None = None) -> Path:
    path = folder / task / (file or f"{RECIPES[task].split}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return folder


def asked(task: Any) -> list[tuple[str, str]]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", RECIPES)
def test_prompts_and_choices(name: str, tmp_path: Path) -> None:
    task = load_file_task(name, write(tmp_path, name, ROWS[name]), None)
    pairs, right = ASKED[name]
    assert asked(task) == pairs
    answers = [(-1.0 * (i != right), False) for i in range(len(pairs))]
    assert task.process_results(task.eval_docs[0], answers)["acc"] == 1.0
    wrong = [(-1.0 * (i == right), False) for i in range(len(pairs))]
    assert task.process_results(task.eval_docs[0], wrong)["acc"] == 0.0


@pytest.mark.parametrize("name", RECIPES)
def test_definitions_are_lm_evals(name: str) -> None:
    home = Path(next(iter(definitions.__path__))) / RECIPES[name].home
    found = definitions.TaskManager(include_path=home, include_defaults=False).task_index[name].cfg
    assert found["output_type"] == "multiple_choice"
    assert found.get("test_split") or found["validation_split"] == RECIPES[name].split
    assert found.get("test_split") in (None, RECIPES[name].split)


@pytest.mark.parametrize(
    ("context", "prompt"),
    [
        ("A lady walks. the lady", "A lady walks. The lady"),  # a sentence begun, as in ActivityNet's part
        ("He asks: why? he", "He asks: why? He"),
        ("How to sew. Take a thread.", "How to sew. Take a thread."),  # whole sentences, as in WikiHow's
        ("a line without a stop", "a line without a stop"),
    ],
)
def test_the_sentence_that_an_ending_continues_gets_its_capital(context: str, prompt: str, tmp_path: Path) -> None:
    row = ROWS["hellaswag"] | {"question": f"Home: {context}"}
    task = load_file_task("hellaswag", write(tmp_path, "hellaswag", row), None)
    assert asked(task)[0][0] == f"Home: {prompt}"


def test_limit_takes_the_first(tmp_path: Path) -> None:
    rows = [ARC | {"question": f"{i}?"} for i in range(5)]
    task = load_file_task("arc_easy", write(tmp_path, "arc_easy", *rows), 2)
    assert [doc["question"] for doc in task.eval_docs] == ["0?", "1?"]


def test_files_are_found(tmp_path: Path) -> None:
    write(tmp_path, "arc_easy", ARC, file="validation.jsonl")
    assert (
        question_file("arc_easy", tmp_path).name == "validation.jsonl"
    )  # not the split that lm-eval takes, but all there is
    assert len(load_file_task("arc_easy", tmp_path, None).eval_docs) == 1
    write(tmp_path, "arc_easy", ARC, ARC)
    assert question_file("arc_easy", tmp_path).name == "test.jsonl"
    (tmp_path / "ARC-Challenge").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl").rename(tmp_path / "ARC-Challenge" / "test.jsonl")
    assert question_file("arc_challenge", tmp_path) == tmp_path / "ARC-Challenge" / "test.jsonl"


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"tasks_folder: .*nowhere \(no such folder\)"):
        question_file("piqa", tmp_path / "nowhere")
    with pytest.raises(RankwiseError, match=r"holds no folder piqa; piqa/validation\.jsonl is needed"):
        question_file("piqa", tmp_path)
    (tmp_path / "piqa").mkdir()
    with pytest.raises(RankwiseError, match=r"piqa holds no questions; validation\.jsonl is needed: fields question"):
        question_file("piqa", tmp_path)
    with pytest.raises(RankwiseError, match=r"piqa/validation\.jsonl is empty"):
        load_file_task("piqa", write(tmp_path, "piqa"), None)
    (tmp_path / "piqa" / "validation.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RankwiseError, match="UnicodeDecodeError"):
        load_file_task("piqa", tmp_path, None)


@pytest.mark.parametrize(
    ("name", "row", "what"),
    [
        ("piqa", "{", "Expecting property name"),
        ("piqa", "[]", "not an object"),
        ("piqa", {"choices": ["a", "b"], "answer": 0}, "question is missing"),
        ("piqa", ROWS["piqa"] | {"question": " "}, "question is ' '"),
        ("piqa", ROWS["piqa"] | {"choices": "ab"}, "choices is 'ab'"),
        ("piqa", ROWS["piqa"] | {"choices": ["a", ""]}, r"choices is \['a', ''\]"),
        ("piqa", ROWS["piqa"] | {"choices": ["a", "b", "c"]}, "3 choices where this task has 2"),
        ("arc_easy", ARC | {"choices": ["a"]}, r"choices is \['a'\]"),
        ("arc_easy", ARC | {"answer": 3}, "answer is 3 for 3 choices"),
        ("arc_easy", ARC | {"answer": "B"}, "answer is 'B' for 3 choices"),
        ("arc_easy", ARC | {"answer": True}, "answer is True for 3 choices"),
        ("boolq", {**ROWS["boolq"], "passage": None}, "passage is missing"),
        ("boolq", ROWS["boolq"] | {"choices": ["true", "false"]}, "not no and yes"),
        ("winogrande", ROWS["winogrande"] | {"question": "no blank"}, "one _ for the blank"),
        ("hellaswag", ROWS["hellaswag"] | {"question": "no activity"}, "form `activity: context`"),
        ("mathqa", ROWS["mathqa"] | {"choices": ["1", "2"], "answer": 0}, "2 choices where this task has 5"),
    ],
)
def test_bad_rows_are_named(name: str, row: Any, what: str, tmp_path: Path) -> None:
    folder = write(tmp_path, name, ROWS[name], "", row)
    with pytest.raises(RankwiseError, match=rf"tasks_folder: .*jsonl line 3: .*{what}.*; fields question") as caught:
        load_file_task(name, folder, 1)
    assert "\n" not in str(caught.value)
