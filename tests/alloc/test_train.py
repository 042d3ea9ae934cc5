"""The training loop: resumable to the bit, fixed by its seed, and of use."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.alloc import train as module
from rankwise.alloc.bank import Bank
from rankwise.alloc.curve import Curve, Ledger, at_most_one
from rankwise.alloc.gumbel import GumbelSigmoid
from rankwise.alloc.masks import Staircase
from rankwise.alloc.objectives import language_loss, squared_compression
from rankwise.alloc.train import Recipe, Step, train
from rankwise.alloc.trainstate import LOG, MASKS, STATE
from rankwise.errors import RankwiseError
from rankwise.files import open_tensors, read_tensors
from rankwise.progress import Bar

RECIPE = Recipe(steps=7, train_len=16, batch=2, lr=0.05, target=0.5, save_every=3)
KINDS_OF_MASK = pytest.mark.parametrize("gumbel", [False, True], ids=["staircase", "gumbel"])


def setting(bench: Any, share: float = 0.5, *, gumbel: bool = False) -> tuple[Bank, Ledger]:
    curves = {name: Curve(m, n, True) for name, (m, n) in bench.stores["two"].shapes.items()}
    masks: dict[str, Any] = {}
    for name, curve in curves.items():
        rank = curve.rank(share)
        masks[name] = GumbelSigmoid(curve.full_rank, rank) if gumbel else Staircase(curve.full_rank, rank)
    return Bank(masks), Ledger(curves)


def objective(ledger: Ledger, target: float = 0.5, weight: float = 100.0) -> module.Objective:
    def loss(step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratio = ledger.kept({name: at_most_one(share) for name, share in step.shares.items()})
        terms = {"ce": language_loss(step.logits, step.ids)}
        return ratio, terms | {"compression": weight * squared_compression(ratio, target)}

    return loss


def learn(
    bench: Any, folder: Path, recipe: Recipe = RECIPE, *, gumbel: bool = False, share: float = 0.5, **changes: Any
) -> dict[str, torch.Tensor]:
    bank, ledger = setting(bench, share, gumbel=gumbel)
    train(bank, ledger, recipe, objective(ledger), bench.calibration(folder, **changes), {"method": "test"})
    return {name: tensor.clone() for name, tensor in bank.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- resumable --------------------------------------------------------------------------------------------------------


@KINDS_OF_MASK
@pytest.mark.parametrize("at", range(1, 8))
def test_killed_at_any_step_the_next_run_learns_the_same_to_the_bit(
    at: int, gumbel: bool, bench: Any, dies: Any, log_of: Any, tmp_path: Path
) -> None:
    whole = learn(bench, tmp_path / "whole", gumbel=gumbel)
    with pytest.raises(InterruptedError):
        learn(bench, tmp_path / "killed", gumbel=gumbel, track=dies(at))
    resumed = learn(bench, tmp_path / "killed", gumbel=gumbel)
    assert equal(whole, resumed)
    assert (tmp_path / "whole" / MASKS).read_bytes() == (tmp_path / "killed" / MASKS).read_bytes()
    lines = log_of(tmp_path / "killed")
    assert [line["step"] for line in lines] == list(range(7))
    timeless = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in log_of(tmp_path / f)]
        for f in ("whole", "killed")
    ]
    assert timeless[0] == timeless[1]


def test_killed_again_and_again(bench: Any, dies: Any, tmp_path: Path) -> None:
    whole = learn(bench, tmp_path / "whole")
    for at in (4, 1, 5):
        with pytest.raises(InterruptedError):
            learn(bench, tmp_path / "killed", track=dies(at))
    assert equal(whole, learn(bench, tmp_path / "killed"))


def test_a_log_line_cut_off_by_a_kill_is_dropped(bench: Any, dies: Any, log_of: Any, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        learn(bench, tmp_path, track=dies(5))
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 5, "rat')
    learn(bench, tmp_path)
    assert [line["step"] for line in log_of(tmp_path)] == list(range(7))


def test_finished_training_is_not_run_again(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = learn(bench, tmp_path)
    monkeypatch.setattr(module, "overlaid", None)
    assert equal(learn(bench, tmp_path), first)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"recipe": replace(RECIPE, lr=0.1)}, "recipe", id="recipe"),
        pytest.param({"seed": 1}, "seed", id="seed"),
        pytest.param({"windows": torch.zeros(4, 32, dtype=torch.long)}, "text", id="text"),
    ],
)
def test_another_trainings_state_is_not_continued(
    change: dict[str, Any], named: str, bench: Any, dies: Any, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedError):
        learn(bench, tmp_path, track=dies(4))
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(RankwiseError, match=f"{STATE} was made with other {named}; use a new folder"):
        learn(bench, tmp_path, **change)
    assert (tmp_path / STATE).read_bytes() == before


def test_a_damaged_state_is_named(bench: Any, dies: Any, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        learn(bench, tmp_path, track=dies(4))
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:100])
    with pytest.raises(RankwiseError, match=STATE):
        learn(bench, tmp_path)


# --- what is fixed and what is written --------------------------------------------------------------------------------


@KINDS_OF_MASK
def test_the_seed_fixes_everything(gumbel: bool, bench: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = learn(bench, tmp_path / "first", gumbel=gumbel)
    torch.manual_seed(2)
    assert equal(first, learn(bench, tmp_path / "second", gumbel=gumbel))
    assert not equal(first, learn(bench, tmp_path / "third", gumbel=gumbel, seed=5))


def test_checkpointing_and_saving_change_nothing(bench: Any, tmp_path: Path) -> None:
    first = learn(bench, tmp_path / "first")
    other = replace(RECIPE, checkpointing=True, save_every=1)
    assert equal(first, learn(bench, tmp_path / "second", other))


def test_the_model_is_untouched_even_by_a_failure(bench: Any, dies: Any, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    with pytest.raises(InterruptedError):
        learn(bench, tmp_path, track=dies(2))
    assert equal(before, bench.model.state_dict())
    assert not any("forward" in module.__dict__ for module in bench.model.modules())
    assert all(p.grad is None for p in bench.model.parameters())


def test_masks_and_log_are_written(bench: Any, log_of: Any, tmp_path: Path) -> None:
    learn(bench, tmp_path)
    masks = read_tensors(tmp_path / MASKS)
    assert {name: len(p) for name, p in masks.items()} == {n: min(s) for n, s in bench.stores["two"].shapes.items()}
    assert all((p.diff() <= 1e-6).all() and float(p[0]) <= 1 + 1e-6 for p in masks.values())
    with open_tensors(tmp_path / MASKS) as file:
        ranks = json.loads(file.metadata()["ranks"])
    assert all(0 < ranks[name] <= len(p) for name, p in masks.items())
    for line in log_of(tmp_path):
        assert list(line) == ["step", "ratio", "ce", "compression", "seconds"]


def test_every_pass_reads_every_piece_once(bench: Any) -> None:
    windows = torch.arange(5 * 12).reshape(5, 12)
    loop = module._Loop.__new__(module._Loop)
    loop.recipe, loop.calibration = replace(RECIPE, batch=3), bench.calibration(Path(), windows=windows)
    loop.pieces = module._pieces(windows, 5)
    assert loop.pieces.tolist()[:2] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    read = torch.cat([loop._batch(number) for number in range(10)])[:, 0].reshape(3, 10)
    assert all(sorted(row.tolist()) == sorted(loop.pieces[:, 0].tolist()) for row in read)
    assert read[0].tolist() != read[1].tolist()
    assert module._pieces(windows, 99).shape == (5, 12)


def test_progress_says_where_it_stands(bench: Any, tmp_path: Path) -> None:
    said: list[str] = []

    class Listener(Bar):
        def __init__(self) -> None: ...
        def __call__(self) -> None: ...
        def __enter__(self) -> "Listener":
            return self

        def __exit__(self, *error: object) -> None: ...
        def say(self, text: str) -> None:
            said.append(text)

    learn(bench, tmp_path, track=lambda name, total: Listener())
    assert len(said) == 7
    assert said[0].startswith("ratio 0.5, ce ")


def test_training_stops_some_steps_after_the_ratio_is_met(bench: Any, log_of: Any, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=60, after=4, lr=0.2)
    learn(bench, tmp_path, recipe, share=0.8)
    ratios = [line["ratio"] for line in log_of(tmp_path)]
    met = next(step for step, ratio in enumerate(ratios) if ratio <= 0.5)
    assert met > 0
    assert len(ratios) == met + 4 + 1 < 60


def test_the_rate_falls_by_a_half_cosine() -> None:
    recipe = replace(RECIPE, steps=100, lr=5.0, last_lr=4.0)
    assert [recipe.rate(step) for step in (0, 50, 100)] == pytest.approx([5, 4.5, 4])
    assert {RECIPE.rate(step) for step in range(7)} == {0.05}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused(value: float, bench: Any, tmp_path: Path) -> None:
    bank, ledger = setting(bench)

    def broken(step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.tensor(0.5), {"ce": language_loss(step.logits, step.ids) * value}

    with pytest.raises(RankwiseError, match=f"loss: {value} in step 0"):
        train(bank, ledger, RECIPE, broken, bench.calibration(tmp_path), {})


def test_half_precision_losses_are_scaled_and_gradients_scaled_back(
    tiny: Callable[..., Any], workbench: Any, tmp_path: Path
) -> None:
    steps = {}
    for dtype in (torch.float16, torch.float32):
        bench = workbench(tiny("llama").to(dtype), "llama", dtype)  # the same numbers, whatever torch draws in fp16
        bank, ledger = setting(bench)
        recipe = replace(RECIPE, steps=1, lr=1e-9)
        train(bank, ledger, recipe, objective(ledger), bench.calibration(tmp_path / str(dtype)), {})
        steps[dtype] = torch.cat([mask.get_parameter("alpha").grad for mask in bank.masks])
    error = (steps[torch.float16] - steps[torch.float32]).norm() / steps[torch.float32].norm()
    assert float(error) < 0.2


# --- of use -----------------------------------------------------------------------------------------------------------


def test_the_ratio_moves_to_the_target(bench: Any, log_of: Any, tmp_path: Path) -> None:
    learn(bench, tmp_path, replace(RECIPE, steps=60, lr=0.05), share=0.8)
    lines = log_of(tmp_path)
    assert lines[0]["ratio"] == pytest.approx(0.8, abs=0.02)
    assert lines[-1]["ratio"] == pytest.approx(0.5, abs=0.03)


def test_the_loss_falls_at_the_same_ratio(bench: Any, log_of: Any, tmp_path: Path) -> None:
    learn(bench, tmp_path, replace(RECIPE, steps=60, lr=0.1, batch=4, train_len=32), share=0.5)
    lines = log_of(tmp_path)
    first, last = (sum(line["ce"] for line in part) / 8 for part in (lines[:8], lines[-8:]))
    assert last < 0.9 * first
    assert lines[-1]["ratio"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_on_a_gpu_comes_back(bench: Any, tmp_path: Path) -> None:
    changed = copy.copy(bench)
    changed.model = copy.deepcopy(bench.model)
    learn(changed, tmp_path, device=torch.device("cuda"))
    assert {p.device.type for p in changed.model.parameters()} == {"cpu"}
    assert equal(bench.model.state_dict(), changed.model.state_dict())
