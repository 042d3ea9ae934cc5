"""Refitted factors on disk: what is written is read, and belongs to one refit."""

import math
from pathlib import Path

import pytest
import torch

from rankwise.alloc.refitted import Refitted
from rankwise.alloc.solve import Outcome
from rankwise.alloc.store import FactorStore
from rankwise.errors import RankwiseError

SHAPES = [{"a.0.q": (4, 3), "a.0.o": (3, 4)}, {"a.1.q": (4, 3), "a.1.o": (3, 4)}]
IDENTITY = {"layers": {"a.0.q": {"rank": 2, "indices": (0, 2), "loss": math.nan}}, "text": "1f"}


def make(folder: Path, identity: dict[str, object] = IDENTITY) -> Refitted:
    return Refitted(folder / "refit", FactorStore(folder / "factors", SHAPES), identity)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    into, u, v, weight = make(tmp_path), torch.randn(4, 2), torch.randn(2, 3), torch.randn(3, 4)
    outcomes = {"a.0.q": Outcome(0.5, 1e-3), "a.0.o": Outcome()}
    into.write(0, {"a.0.q": {"u": u, "v": v}, "a.0.o": {}}, outcomes)
    assert into.outcomes() == outcomes
    assert into.weights(0).keys() == {"a.0.q"}
    into.write(1, {"a.1.q": {}, "a.1.o": {"weight": weight}}, {"a.1.o": Outcome(1.0, 2.0)})
    again = make(tmp_path)
    assert torch.equal(again.load("a.0.q", 2)[0], u)
    assert torch.equal(again.load("a.0.q", 2, (0, 2))[1], v)
    assert torch.equal(again.weights(0)["a.0.q"], u @ v)
    assert torch.equal(again.weights(1)["a.1.o"], weight)
    assert again.weight("a.0.o", u) is u
    assert torch.equal(again.weight("a.1.o", torch.zeros(3, 4)), weight)
    assert again.outcomes() == outcomes | {"a.1.o": Outcome(1.0, 2.0)}
    assert again.shapes == {name: shape for block in SHAPES for name, shape in block.items()}


def test_another_refit_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path)  # the same one is not, with tuples and numbers that JSON cannot say in its identity
    with pytest.raises(RankwiseError, match=r"^refit: .*refit was made with other text; use a new folder"):
        make(tmp_path, IDENTITY | {"text": "2f"})


def test_files_that_nobody_owns_are_refused(tmp_path: Path) -> None:
    make(tmp_path).write(0, {}, {})
    (tmp_path / "refit" / "refit.json").unlink()
    with pytest.raises(RankwiseError, match=r"^refit: .*\(no refit.json in it\)"):
        make(tmp_path)
