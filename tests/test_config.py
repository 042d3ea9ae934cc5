"""Options are checked when they are made."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from rankwise.alloc.methods import Ara, Global, Rankwise
from rankwise.config import CompressConfig, TextConfig, check_count, check_fraction
from rankwise.errors import RankwiseError
from rankwise.jobs import Job

LOWEST = {"samples": 1, "gradient_samples": 1, "seq_len": 2, "measure": 0, "seed": 0, "learn_samples": 0}
NO_NUMBERS = [
    pytest.param(1.0, id="float"),
    pytest.param("4", id="text"),
    pytest.param(None, id="none"),
    pytest.param(True, id="bool"),
    pytest.param(math.nan, id="nan"),
]


@pytest.mark.parametrize("field", LOWEST)
def test_text_counts_have_a_lowest_value(field: str) -> None:
    lowest = LOWEST[field]
    assert getattr(TextConfig(**{field: lowest}), field) == lowest
    with pytest.raises(RankwiseError, match=f"^{field}: {lowest - 1}; .*whole number from {lowest}$"):
        TextConfig(**{field: lowest - 1})


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("field", LOWEST)
def test_text_counts_are_whole_numbers(field: str, value: Any) -> None:
    with pytest.raises(RankwiseError) as caught:
        TextConfig(**{field: value})
    assert caught.value.field == field


def test_options_cannot_change_after_the_check() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TextConfig().samples = 0  # type: ignore[misc]


@pytest.mark.parametrize("value", [1e-9, 0.5, 1, 1.0])
def test_fractions_above_zero_up_to_one_pass(value: float) -> None:
    check_fraction("ratio", value)


@pytest.mark.parametrize(
    "value", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, -math.inf, "0.5", None, True, False, [0.5]]
)
def test_other_fractions_are_refused(value: Any) -> None:
    with pytest.raises(RankwiseError, match=r"^ratio: .*above 0 and at most 1$"):
        check_fraction("ratio", value)


def test_counts_accept_their_lowest_value() -> None:
    check_count("rank", 1, 1)
    with pytest.raises(RankwiseError, match=r"^rank: 0; allowed: a whole number from 1$"):
        check_count("rank", 0, 1)


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16", "fp32"])
def test_known_dtypes_pass(dtype: str, tmp_path: Path) -> None:
    assert CompressConfig("model", tmp_path / "out", Global(), dtype=dtype).dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "int8", "", None])
def test_other_dtypes_are_refused(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"^dtype: .*auto, bf16, fp16, fp32$"):
        CompressConfig("model", tmp_path / "out", Global(), dtype=dtype)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_that_exists_is_overwritten(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir() if kind == "folder" else out.write_text("mine")
    with pytest.raises(RankwiseError, match=r"^out: .*does not exist yet"):
        CompressConfig("model", out, Global())


def test_a_result_whose_work_folder_was_not_cleaned_up_can_be_finished(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Job.open(tmp_path / "out", {}) as job:
        (job.folder / "work").write_text("left over")
    assert CompressConfig("model", tmp_path / "out", Global()).out == tmp_path / "out"
    with pytest.raises(RankwiseError, match=r"^out: "):
        CompressConfig("model", tmp_path / "out", Global(), restart=True)


def test_windows_to_learn_from_need_a_text() -> None:
    assert TextConfig(learn="a.txt", learn_samples=3).learn_samples == 3
    with pytest.raises(RankwiseError, match=r"^learn_samples: 3; allowed: 0 without a text to learn from$"):
        TextConfig(learn_samples=3)


@pytest.mark.parametrize("value", [-1, 1.5, True, "3"])
def test_steps_of_healing_are_a_whole_number(value: Any, tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"^heal: .*a whole number from 0$"):
        CompressConfig("model", tmp_path / "out", Global(), heal=value)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "score-only and scores": ({"score_only": True, "scores": Path("s")}, "score_only: with scores; "),
    "score-only and a plan": ({"score_only": True, "plan": Path("p")}, "score_only: with plan; "),
    "score-only and a refit": ({"score_only": True, "refit": True}, "score_only: with refit; "),
    "score-only and healing": ({"score_only": True, "heal": 3}, "score_only: with heal; "),
    "scores and a plan": ({"scores": Path("s"), "plan": Path("p")}, "scores: with plan; "),
    "scores and a refit": ({"scores": Path("s"), "refit": True}, "refit: with scores; "),
}


@pytest.mark.parametrize(("options", "start"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_refused(options: dict[str, Any], start: str, tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=f"^{start}allowed: "):
        CompressConfig("model", tmp_path / "out", Global(), **options)


@pytest.mark.parametrize(
    ("method", "options", "refits", "learns"),
    [
        (Global(), {}, False, False),
        (Global(), {"refit": True}, True, True),
        (Global(), {"heal": 1}, False, True),
        (Rankwise(), {}, True, True),
        (Rankwise(), {"refit": False}, False, False),
        (Rankwise(), {"score_only": True}, False, False),
        (Rankwise(), {"score_only": True, "refit": False}, False, False),
        (Rankwise(), {"scores": Path("s")}, False, False),
        (Rankwise(), {"scores": Path("s"), "heal": 1}, False, True),
        (Rankwise(), {"plan": Path("p")}, True, True),
        (Ara(), {}, False, True),
        (Ara(), {"score_only": True}, False, True),
        (Ara(), {"scores": Path("s")}, False, False),
        (Ara(), {"plan": Path("p")}, False, False),
    ],
)
def test_what_is_refitted_and_what_learns(
    method: Any, options: dict[str, Any], refits: bool, learns: bool, tmp_path: Path
) -> None:
    config = CompressConfig("model", tmp_path / "out", method, **options)
    assert (config.refits, config.learns) == (refits, learns)
