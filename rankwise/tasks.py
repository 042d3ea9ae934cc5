"""Accuracy on multiple-choice tasks, by lm-eval (EleutherAI's evaluation harness)."""

import copy
import difflib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from rankwise.config import check, check_count
from rankwise.errors import RankwiseError
from rankwise.progress import Track, silent
from rankwise.taskfiles import RECIPES, load_file_task

Scores = dict[str, dict[str, Any]]
Chosen = tuple[str | None, Path | None, int | None]  # --tasks, --tasks-folder, --limit
Measure = Callable[[Any, Any], dict[str, Any]]  # of a model and its tokenizer
SEED = 1234  # lm-eval's own, for tasks that draw examples
BATCH = {"cpu": 16, "cuda": 64}  # continuations; on a CPU less padding is worth more than larger batches


def load_tasks(names: Sequence[str], *, folder: Path | None = None, limit: int | None = None) -> dict[str, Any]:
    """lm-eval's tasks by name, their questions read.

    Args:
        names: lm-eval's names, without doubles; a group or tag of lm-eval's stands for all its tasks.
        folder: takes the questions from local files (`rankwise.taskfiles`) instead of the hub.
        limit: questions a task, from its start; None takes all.

    Returns:
        Tasks by name, for `accuracy`; none that lm-eval does not score by accuracy.

    Raises:
        RankwiseError: lm-eval is missing, an unknown name, or questions that cannot be had.
    """
    if limit is not None:
        check_count("limit", limit, 1)
    if not names or not all(names):
        raise RankwiseError("tasks", ",".join(names), "names with commas between them: arc_easy,piqa")
    _require_lm_eval()
    with _hushed():
        if folder is not None:
            return {name: load_file_task(_known(name, RECIPES), folder, limit) for name in names}
        return _hub_tasks(names)


def accuracy(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | Mapping[str, Any],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    track: Track = silent,
) -> Scores:
    """Share of questions whose right answer the model finds the likeliest, zero-shot unless a hub task says otherwise.

    Prompts and scores are lm-eval's: the choice with the largest log-likelihood (`acc`), or with the largest one
    divided by the number of characters of the choice (`acc_norm`, for tasks that define it).

    Args:
        model: causal language model, on any device.
        tokenizer: its tokenizer.
        tasks: names, or what `load_tasks` returned.
        folder: see `load_tasks`.
        limit: questions a task, from its start; None takes all.
        batch_size: choices that run side by side; None: 16 on a CPU, 64 elsewhere.
        track: progress, one step a choice.

    Returns:
        By task: `questions`; `acc`, `acc_stderr` and, where lm-eval defines it, `acc_norm`, `acc_norm_stderr`, shares
        between 0 and 1 (the error of a single question is None); `truncated`, the choices whose prompt lost its start
        because the model's context is too short.

    Raises:
        RankwiseError: see `load_tasks`.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None:
            check_count(name, value, 1)
    loaded = dict(tasks) if isinstance(tasks, Mapping) else load_tasks(tasks, folder=folder, limit=limit)
    from lm_eval.evaluator import evaluate

    from rankwise.likelihood import SharedContext

    padded = tokenizer if tokenizer.pad_token else copy.deepcopy(tokenizer)  # lm-eval would give it a pad token
    size = batch_size or BATCH.get(model.device.type, BATCH["cuda"])
    with _hushed() as stderr:
        lm = SharedContext(model, padded, batch_size=size, track=track, stderr=stderr)
        found = evaluate(lm=lm, task_dict={"tasks": loaded}, limit=limit, log_samples=False)["results"]
    return {name: _scores(found[name]) | {"truncated": lm.truncated[name]} for name in loaded}


def mean_accuracy(scores: Scores) -> dict[str, float]:
    """Means over tasks: of `acc`, and of `acc_norm` (of `acc` for tasks without it)."""
    return {
        "acc": fmean(score["acc"] for score in scores.values()),
        "acc_norm": fmean(score["acc_norm" if "acc_norm" in score else "acc"] for score in scores.values()),
    }


def nothing(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Measure nothing."""
    return {}


def measurer(names: str | None, folder: Path | None, limit: int | None, track: Track = silent) -> Measure:
    """Read the questions now, measure models later.

    Args:
        names: with commas between them; None measures nothing.
        folder: see `load_tasks`; not without names.
        limit: questions a task; not without names.
        track: progress.

    Returns:
        A function of model and tokenizer that gives `tasks` (what `accuracy` returns) and the means over them,
        `accuracy` and `accuracy_norm`; without names it gives nothing.

    Raises:
        RankwiseError: see `load_tasks`.
    """
    if names is None:
        for option, value in (("tasks_folder", folder), ("limit", limit)):
            check(option, str(value), value is None, "only beside --tasks")
        return nothing
    tasks = load_tasks(list(dict.fromkeys(names.replace(" ", "").split(","))), folder=folder, limit=limit)

    def measure(model: Any, tokenizer: Any) -> dict[str, Any]:
        scores = accuracy(model, tokenizer, tasks, limit=limit, track=track)
        means = mean_accuracy(scores)
        return {"tasks": scores, "accuracy": means["acc"], "accuracy_norm": means["acc_norm"]}

    return measure


def _require_lm_eval() -> None:
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise RankwiseError("tasks", str(error), "needs the extra: pip install 'rankwise[tasks]'") from None


def _known(name: str, names: Iterable[str]) -> str:
    if name in (known := list(names)):
        return name
    near = difflib.get_close_matches(name, known, n=3) if len(known) > len(RECIPES) else sorted(known)
    raise RankwiseError("tasks", name, f"allowed: {', '.join(near) or 'the names that `lm-eval ls tasks` lists'}")


def _hub_tasks(names: Sequence[str]) -> dict[str, Any]:
    from lm_eval import tasks as definitions

    homes = {str(Path(next(iter(definitions.__path__))) / recipe.home) for recipe in RECIPES.values()}
    few = set(names) <= set(RECIPES)  # reading all of lm-eval's definitions takes ten seconds
    manager = definitions.TaskManager(include_path=sorted(homes) if few else None, include_defaults=not few)
    for name in names:
        _known(name, manager.all_tasks)
    try:
        loaded = dict(manager.load(list(names))["tasks"])
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{', '.join(names)} ({type(error).__name__}: {str(error)[:120]})"
        raise RankwiseError("tasks", reason, "the hub must be reachable; or name --tasks-folder") from None
    for name, task in loaded.items():
        task.set_fewshot_seed(seed=SEED)
        if "acc" not in task.aggregation():
            raise RankwiseError("tasks", name, "allowed: tasks that lm-eval scores by acc")
    return loaded


def _scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's `acc,FILTER` and the like, without the filter."""
    plain = {key.partition(",")[0]: value for key, value in reversed(list(metrics.items()))}
    wanted = [key for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr") if key in plain]
    numbers = {key: plain[key] if isinstance(plain[key], int | float) else None for key in wanted}
    return {"questions": metrics["sample_len"], **numbers}


@contextmanager
def _hushed() -> Iterator[TextIO]:
    """lm-eval draws bars that no setting turns off, and warns about its own defaults. Yields the real stderr."""
    logger, stderr = logging.getLogger("lm_eval"), sys.stderr
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield stderr
    finally:
        logger.setLevel(level)
