"""A small model that was trained a little, with its curvature and factors: what learning methods learn from."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import Curvature, collect
from rankwise.alloc.store import FactorStore, factorize_model

CPU = torch.device("cpu")
SIDES = ("one", "two", "diagonal")


def sentences(count: int, length: int, seed: int) -> torch.Tensor:
    """Text with something to learn in it: runs that count up, each from a start of its own."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(2, 60, (count, length // 8), generator=generator)
    return (starts[:, :, None] + torch.arange(8)).reshape(count, -1)


@dataclass
class Workbench:
    """Everything that a `Calibration` is made of."""

    model: Any
    curvature: Curvature
    stores: dict[str, FactorStore]
    windows: torch.Tensor

    def calibration(self, folder: Path, sides: str = "two", **changes: Any) -> Calibration:
        """What a method with these sides is given, with a folder of its own."""
        usual = {"windows": self.windows, "device": CPU, "factors": self.stores[sides]}
        return Calibration(model=self.model, curvature=self.curvature, folder=folder, **(usual | changes))


def teach(model: Any, steps: int) -> None:
    """Train on the sentences, from outside any test."""
    model.requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = sentences(8, 32, 1000 + step)
        logits = model(input_ids=ids).logits[:, :-1].float()
        optimiser.zero_grad()
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimiser.step()
    optimiser.zero_grad()
    model.requires_grad_(False)


@pytest.fixture(scope="session")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Workbench]:
    """`workbench("llama")`: made once for each family; `taught` steps of training go before."""
    made: dict[Any, Workbench] = {}

    def make(model: Any, *key: Any, taught: int = 0) -> Workbench:
        if (key, taught) not in made:
            teach(model, taught)
            folder, windows = tmp_path_factory.mktemp("bench"), sentences(12, 32, 0)
            curvature = collect(model, windows[:6], windows[6:8], folder / "curvature", device=CPU)
            stores = {
                sides: factorize_model(model, curvature, folder / sides, sides=sides, device=CPU) for sides in SIDES
            }
            made[key, taught] = Workbench(model, curvature, stores, windows)
        return made[key, taught]

    return make


@pytest.fixture
def bench(workbench: Callable[..., Workbench], tiny: Callable[..., Any]) -> Workbench:
    """A llama of two blocks that has learnt to count."""
    return workbench(tiny("llama"), "llama", taught=200)


@pytest.fixture
def dies() -> Callable[[int], Callable[..., AbstractContextManager[Callable[[], None]]]]:
    """`dies(3)`: a progress report that ends the run when the third step is reported."""

    def at(steps: int) -> Callable[..., AbstractContextManager[Callable[[], None]]]:
        done = 0

        @contextmanager
        def track(name: str, total: int) -> Iterator[Callable[[], None]]:
            def advance() -> None:
                nonlocal done
                done += 1
                if done == steps:
                    raise InterruptedError

            yield advance

        return track

    return at


@pytest.fixture
def log_of() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a training's log."""
    return lambda folder: [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
