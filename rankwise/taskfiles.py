"""Questions in local files as lm-eval's own tasks.

Rows are put back into the fields of the hub's data sets, so that prompts, choices and scores are made by lm-eval's
definitions of these tasks and not by copies of them.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError

Row = dict[str, Any]
SPLITS = ("test", "validation")
FIELDS = "fields question (text), choices (list of texts), answer (index from 0)"


@dataclass(frozen=True)
class Recipe:
    """How a row becomes one of the hub's.

    Args:
        home: where lm-eval defines the task, below its folder `tasks`.
        split: the split that lm-eval evaluates.
        to_hub: row with `question`, `choices`, `answer` -> row of the hub's data set.
        count: choices that a question has to have; 0: any number.
        passage: whether rows have a field `passage`.
    """

    home: str
    split: str
    to_hub: Callable[[Row], Row]
    count: int = 0
    passage: bool = False


def load_file_task(name: str, folder: Path, limit: int | None) -> Any:
    """lm-eval's task `name` over the questions in `folder/NAME/{test,validation}.jsonl`.

    Args:
        name: a key of `RECIPES`. Its folder may be spelt as in the papers: `ARC-Easy` for `arc_easy`.
        folder: holds one folder a task.
        limit: questions from the start of the file; None takes all.

    Returns:
        An `lm_eval` task.

    Raises:
        RankwiseError: a folder or file that is not there, or a row that lacks something.
    """
    from datasets import Dataset, DatasetDict
    from lm_eval import tasks as definitions

    recipe = RECIPES[name]
    home = Path(next(iter(definitions.__path__))) / recipe.home
    manager = definitions.TaskManager(include_path=home, include_defaults=False)
    rows = list(_hub_rows(recipe, question_file(name, folder)))
    data = DatasetDict({recipe.split: Dataset.from_list(rows[:limit])})
    local = {"task": name, "custom_dataset": lambda **_: data, "training_split": None, "fewshot_split": None}
    splits = {f"{key}_split": key if key == recipe.split else None for key in SPLITS}
    group = manager.load([{"group": "files", "task": [local | splits]}])
    return group["tasks"][name]


def question_file(name: str, folder: Path) -> Path:
    """The file that holds a task's questions: of the split that lm-eval evaluates, else of the other one.

    Raises:
        RankwiseError: no such folder, or no such file in it.
    """
    split = RECIPES[name].split
    if not folder.is_dir():
        raise RankwiseError("tasks_folder", f"{folder} (no such folder)", "a folder that holds one folder a task")
    homes = sorted(path for path in folder.iterdir() if path.is_dir() and _plain(path.name) == name)
    if not homes:
        raise RankwiseError("tasks_folder", f"{folder} holds no folder {name}", f"{name}/{split}.jsonl is needed")
    files = [home / f"{part}.jsonl" for home in homes for part in (split, *SPLITS)]
    found = next((path for path in files if path.is_file()), None)
    if found is None:
        raise RankwiseError("tasks_folder", f"{homes[0]} holds no questions", f"{split}.jsonl is needed: {FIELDS}")
    return found


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _hub_rows(recipe: Recipe, path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RankwiseError("tasks_folder", f"{path} ({type(error).__name__})", "UTF-8 JSON lines") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise RankwiseError("tasks_folder", f"{path} is empty", f"one JSON object a line: {FIELDS}")
    for number, line in numbered:
        try:
            row = json.loads(line)
            _check(row, recipe)
            yield recipe.to_hub(row)
        except ValueError as error:
            raise RankwiseError("tasks_folder", f"{path} line {number}: {error}", FIELDS) from None


def _check(row: Any, recipe: Recipe) -> None:
    """Raise a ValueError that says what is wrong with a row."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    choices, answer = row.get("choices"), row.get("answer")
    texts = ("question", "passage") if recipe.passage else ("question",)
    for key in texts:
        if not _is_text(row.get(key)):
            raise ValueError(f"{key} is {_short(row.get(key))}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise ValueError(f"choices is {_short(choices)}")
    if recipe.count and len(choices) != recipe.count:
        raise ValueError(f"{len(choices)} choices where this task has {recipe.count}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"answer is {_short(answer)} for {len(choices)} choices")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _short(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


def _arc(row: Row) -> Row:
    return {"question": row["question"], **_lettered(row)}


def _openbookqa(row: Row) -> Row:
    return {"question_stem": row["question"], **_lettered(row)}


def _lettered(row: Row) -> Row:
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    return {"choices": {"text": row["choices"], "label": letters}, "answerKey": letters[row["answer"]]}


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": row["question"], "sol1": first, "sol2": second, "label": row["answer"]}


def _winogrande(row: Row) -> Row:
    if row["question"].count("_") != 1:
        raise ValueError("question needs one _ for the blank")
    first, second = row["choices"]
    return {"sentence": row["question"], "option1": first, "option2": second, "answer": str(row["answer"] + 1)}


def _boolq(row: Row) -> Row:
    words = [choice.strip().lower() for choice in row["choices"]]
    if sorted(words) != ["no", "yes"]:
        raise ValueError(f"choices is {_short(row['choices'])}, not no and yes")
    label = ["no", "yes"].index(words[row["answer"]])
    return {"passage": row["passage"], "question": row["question"].strip().removesuffix("?"), "label": label}


def _hellaswag(row: Row) -> Row:
    """The hub keeps the begun last sentence apart (lm-eval gives it a capital): here, what follows the last stop."""
    activity, colon, context = row["question"].partition(": ")
    if not colon:
        raise ValueError("question needs the form `activity: context`")
    begun = re.fullmatch(r"(.*[.?!\"')])\s+([^.?!]*)", context, re.DOTALL)
    whole, rest = begun.groups() if begun else (context, "")
    return {
        "activity_label": activity,
        "ctx_a": whole,
        "ctx_b": rest,
        "endings": row["choices"],
        "label": str(row["answer"]),
    }


def _mathqa(row: Row) -> Row:
    """The hub's one line of options, which is all lower case there."""
    letters = "abcde"
    options = [f"{letter} ) {choice.lower()}" for letter, choice in zip(letters, row["choices"], strict=True)]
    return {"Problem": row["question"], "options": " , ".join(options), "correct": letters[row["answer"]]}


RECIPES = {
    "arc_challenge": Recipe("arc", "test", _arc),
    "arc_easy": Recipe("arc", "test", _arc),
    "boolq": Recipe("super_glue/boolq", "validation", _boolq, 2, passage=True),
    "hellaswag": Recipe("hellaswag", "validation", _hellaswag),
    "mathqa": Recipe("mathqa", "test", _mathqa, 5),
    "openbookqa": Recipe("openbookqa", "test", _openbookqa),
    "piqa": Recipe("piqa", "validation", _piqa, 2),
    "winogrande": Recipe("winogrande", "validation", _winogrande, 2),
}
