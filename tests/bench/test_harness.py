"""Rows of one table: which windows judge and which are learnt from, and which rows stand."""

from pathlib import Path

import pytest
import torch

from bench.harness import Case, metric, parse, require_metric
from rankwise.alloc.curvature import FORMAT
from rankwise.windows import JUDGES

TEXTS = ["--train", "train.txt", "--test", "test.txt", "--c4", "c4.jsonl"]


@pytest.mark.parametrize(("samples", "gradients"), [(64, 24), (8, 2), (16, 4), (4, 12), (24, 24)])
def test_nothing_is_fitted_to_windows_that_judge(samples: int, gradients: int) -> None:
    case = Case("global", "global", 0.8, samples=samples, gradient_samples=gradients)
    every = torch.arange(120)
    judges = case.judges(every)
    assert len(judges) == JUDGES
    for fitted in (every[:samples], every[:gradients], every[case.learns_from :]):
        assert not set(judges.tolist()) & set(fitted.tolist())


def test_rows_that_see_gradients_carry_their_form() -> None:
    options = parse("methods", "", TEXTS)
    assert metric(Case("a", "global", 0.8), options) == {"curvature": FORMAT}
    assert metric(Case("b", "svd-llm", 0.8, refit=True), options) == {"curvature": FORMAT}
    assert metric(Case("c", "svd-llm", 0.8), options) == metric(Case("dense", "", 1.0), options) == {}


def test_rows_of_another_form_are_refused() -> None:
    metrics = {"1": {"curvature": FORMAT}, "2": {}}
    rows = [{"key": "1", "name": "global", "curvature": FORMAT}, {"key": "2", "name": "svd-llm"}]
    other = {"key": "3", "name": "of another set of cases", "curvature": FORMAT - 1}
    require_metric([*rows, other], metrics, Path("rows"))
    for old in ({"key": "1", "name": "global", "curvature": FORMAT - 1}, {"key": "1", "name": "global"}):
        with pytest.raises(SystemExit, match="rows: global were measured with another curvature"):
            require_metric([*rows, old], metrics, Path("rows"))
