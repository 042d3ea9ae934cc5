"""Healing: nearer to the dense model on text that it was not trained on, resumable to the bit, harmless."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

from rankwise.alloc.heal import STATE, HealConfig, heal
from rankwise.alloc.methods import Global
from rankwise.alloc.teacher import Teacher
from rankwise.errors import RankwiseError
from rankwise.files import read_tensors
from rankwise.pipeline import compress

QUICK = HealConfig(steps=7, batch=2, check_every=3, lr=1e-3)
JUDGES = 4
IDENTITY = {"plan": {"rank": 4, "indices": (0, 2)}, "loss": float("nan")}


@dataclass
class Patient:
    """A compressed model, what the dense one says, and text that the dense one said: the last four windows judge."""

    model: Any
    dense: Any
    names: list[str]
    teacher: Teacher
    windows: torch.Tensor

    def heal(
        self, folder: Path, config: HealConfig = QUICK, identity: dict[str, Any] = IDENTITY, **options: Any
    ) -> Any:
        common = {"held_out": JUDGES, "config": config, "folder": folder, "identity": identity}
        return heal(self.model, self.names, self.teacher, self.windows, **(common | options))

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def divergence(self, windows: torch.Tensor) -> float:
        """From the dense model, over the whole vocabulary."""
        p, q = (model(input_ids=windows).logits.double().log_softmax(-1) for model in (self.dense, self.model))
        return float(kl_div(q, p, log_target=True, reduction="sum")) / windows.numel()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Patient]:
    return {}


@pytest.fixture
def patient(
    tiny: Callable[..., Any],
    workbench: Callable[..., Any],
    spoken: Callable[..., torch.Tensor],
    made: dict[Any, Patient],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Patient]:
    """`patient("llama")`: one that has learnt to count, with layers of every kind; each call gives a model."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> Patient:
        if (family, dtype) not in made:
            bench = workbench(tiny(family), family, taught=200)
            dense, model = (copy.deepcopy(bench.model).to(dtype) for _ in range(2))
            windows = spoken(dense, 20, 24)
            plan = Global(0.5, rank_multiple=1).allocate(bench.stores["two"], "fp32")
            for name in list(plan.compressed)[::2]:
                spec = plan.layers[name]
                plan.layers[name] = replace(spec, kind="lowrank", rank=max(1, spec.rank // 2))
            teacher = Teacher(tmp_path_factory.mktemp("teacher"))
            teacher.listen(dense, windows)
            small = compress(model, plan, bench.stores["two"])
            made[family, dtype] = Patient(small, dense, list(plan.compressed), teacher, windows)
        known = made[family, dtype]
        return replace(known, model=copy.deepcopy(known.model))

    return make


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_divergence_on_unseen_text_falls(
    family: str, patient: Callable[..., Patient], spoken: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    p = patient(family)
    unseen = spoken(p.dense, 16, 24, seed=5)
    before = p.divergence(unseen)
    found = p.heal(tmp_path, HealConfig(steps=60, batch=2, lr=3e-3))
    assert found.step == 60
    assert found.best < found.before
    assert p.divergence(unseen) < 0.95 * before


def test_bf16_learns_in_steps_below_its_rounding(patient: Callable[..., Patient], tmp_path: Path) -> None:
    """The sums are kept in fp32: at this rate one step alone would be rounded away."""
    p = patient(dtype=torch.bfloat16)
    before = p.state()
    p.heal(tmp_path, HealConfig(steps=40, batch=2, lr=3e-4))
    assert {tensor.dtype for tensor in p.model.parameters()} == {torch.bfloat16}
    assert not equal(before, p.state())


def test_half_precision_keeps_small_gradients(
    patient: Callable[..., Patient], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ten thousand times smaller than these models have them; fp16 has hardly a number for those by themselves."""
    seen = {}
    step = torch.optim.Adam.step

    def look(optimiser: torch.optim.Adam) -> None:
        seen[dtype] = torch.cat([p.grad.flatten() for g in optimiser.param_groups for p in g["params"]])
        step(optimiser)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    divergence = Teacher.divergence
    monkeypatch.setattr(Teacher, "divergence", lambda *given: divergence(*given) * 1e-4)
    for dtype in (torch.float16, torch.float32):
        p = patient(dtype=dtype)
        p.heal(tmp_path / str(dtype), HealConfig(steps=1, lr=1e-9))
    error = (seen[torch.float16] - seen[torch.float32]).norm() / seen[torch.float32].norm()
    assert float(error) < 0.05


def test_a_step_whose_gradients_overflow_is_left_out(
    patient: Callable[..., Patient], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    p = patient(dtype=torch.float16)
    before = p.state()
    monkeypatch.setattr("rankwise.alloc.objectives.FP16_SCALE", 2.0**40)
    p.heal(tmp_path, HealConfig(steps=3, batch=2, lr=1e-3))
    assert equal(before, p.state())
    monkeypatch.undo()
    p.heal(tmp_path / "again", HealConfig(steps=30, batch=2, lr=1e-3))
    assert not equal(before, p.state())


def test_the_best_point_met_is_returned(patient: Callable[..., Patient], tmp_path: Path) -> None:
    p = patient()
    found = p.heal(tmp_path, HealConfig(steps=30, check_every=2, lr=0.05))
    losses = [loss for _, loss in found.history]
    assert found.history[0] == (0, found.before)
    assert [step for step, _ in found.history] == [0, *range(2, 31, 2)]
    assert found.best == min(losses) < losses[-1]  # the rate is too high, so the last point is not the best one
    held_out = [float(p.teacher.divergence(n, p.model(input_ids=p.windows[n][None]).logits[0])) for n in range(16, 20)]
    assert sum(held_out) / JUDGES == pytest.approx(found.best, rel=1e-5)


def test_a_healing_that_does_harm_changes_nothing(patient: Callable[..., Patient], tmp_path: Path) -> None:
    p = patient()
    before = p.state()
    found = p.heal(tmp_path, HealConfig(steps=5, check_every=1, lr=10.0))
    assert found.best == found.before
    assert min(loss for step, loss in found.history if step) > found.before
    assert equal(before, p.state())


def test_no_steps_change_nothing(patient: Callable[..., Patient], tmp_path: Path) -> None:
    p = patient()
    before = p.state()
    found = p.heal(tmp_path, HealConfig(steps=0))
    assert found.best == found.before > 0
    assert equal(before, p.state())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_alone_are_trained(family: str, patient: Callable[..., Patient], tmp_path: Path) -> None:
    p = patient(family)
    flags = {name: number % 3 == 0 for number, (name, _) in enumerate(p.model.named_parameters())}
    for name, parameter in p.model.named_parameters():
        parameter.requires_grad_(flags[name])
    before = p.state()
    with torch.no_grad():  # of the caller's; it is no hindrance
        p.heal(tmp_path)
    ending = (".lowrank_u", ".lowrank_v", ".pivot_basis", ".pivot_coeff")
    after = p.state()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(ending)}
    assert {name.rpartition(".")[0] for name in moved} == set(p.names)
    assert {name: parameter.requires_grad for name, parameter in p.model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in p.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("at", range(1, 8))
def test_killed_at_any_step_the_next_run_gives_the_same_bits(
    at: int, dtype: torch.dtype, patient: Callable[..., Patient], dies: Any, tmp_path: Path
) -> None:
    whole, killed = patient(dtype=dtype), patient(dtype=dtype)
    expected = whole.heal(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        killed.heal(tmp_path / "killed", track=dies(at))
    flags = {parameter.requires_grad for parameter in killed.model.parameters()}
    assert flags == {False}
    assert all(parameter.grad is None for parameter in killed.model.parameters())
    assert (tmp_path / "killed" / STATE).exists() == (at >= 3)
    resumed = patient(dtype=dtype)
    found = resumed.heal(tmp_path / "killed")
    assert equal(whole.state(), resumed.state())
    assert (found.step, found.before, found.best) == (expected.step, expected.before, expected.best)
    assert [tuple(pair) for pair in found.history] == expected.history
    assert equal(*(read_tensors(tmp_path / name / STATE) for name in ("whole", "killed")))


def test_a_finished_healing_is_found_again(patient: Callable[..., Patient], tmp_path: Path) -> None:
    first, second, asked = patient(), patient(), []
    first.heal(tmp_path)
    second.model.register_forward_pre_hook(lambda module, args: asked.append(1))
    second.heal(tmp_path)
    assert asked == []
    assert equal(first.state(), second.state())


def test_another_healing_is_refused(patient: Callable[..., Patient], tmp_path: Path) -> None:
    p = patient()
    p.heal(tmp_path)
    other = patient()
    before = other.state()
    with pytest.raises(RankwiseError, match=r"^heal: .* was made with other plan; use a new folder, or --restart"):
        other.heal(tmp_path, identity=IDENTITY | {"plan": {"rank": 5}})
    assert equal(before, other.state())
    assert {parameter.requires_grad for parameter in other.model.parameters()} == {False}


def test_seed_and_text_decide_the_order(patient: Callable[..., Patient], tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        p = patient()
        p.heal(tmp_path / name, replace(QUICK, seed=seed))
        runs[name] = p.state()
    assert equal(runs["a"], runs["b"])
    assert not equal(runs["a"], runs["c"])


def test_judges_are_never_trained_on(patient: Callable[..., Patient], tmp_path: Path) -> None:
    """With every window of the 16 others seen three times over."""
    p, seen = patient(), []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            seen.append(kwargs["input_ids"][0].tolist())

    p.model.register_forward_pre_hook(note, with_kwargs=True)
    p.heal(tmp_path, HealConfig(steps=24, batch=2, check_every=24))
    rows = p.windows.tolist()
    assert [sorted(seen[at : at + 16]) for at in (0, 16, 32)] == [sorted(rows[:16])] * 3
    assert seen[:16] != seen[16:32]  # in another order each time


def test_a_loss_that_is_no_number_is_refused(patient: Callable[..., Patient], tmp_path: Path) -> None:
    p = patient()
    p.model.lm_head.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(RankwiseError, match=r"^heal: loss nan in step 0; try "):
        p.heal(tmp_path)
    assert all(parameter.grad is None for parameter in p.model.parameters())


@pytest.mark.parametrize("held_out", [0, 20, 21])
def test_some_windows_must_judge_and_some_train(held_out: int, patient: Callable[..., Patient], tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=f"^held-out windows: {held_out}; allowed: 1 to 19$"):
        patient().heal(tmp_path, held_out=held_out)


def test_something_must_be_compressed(patient: Callable[..., Patient], tmp_path: Path) -> None:
    p = replace(patient(), names=[])
    with pytest.raises(RankwiseError, match=r"^heal: no compressed layer; there is nothing to train$"):
        p.heal(tmp_path)


@pytest.mark.parametrize(
    ("option", "field"),
    [({"steps": -1}, "heal"), ({"batch": 0}, "batch"), ({"check_every": 0}, "check_every"), ({"seed": -1}, "seed")]
    + [({"lr": value}, "lr") for value in (0.0, -1.0, float("nan"), float("inf"))],
)
def test_options_are_checked(option: dict[str, Any], field: str) -> None:
    with pytest.raises(RankwiseError, match=f"^{field}: "):
        HealConfig(**option)


def test_the_rate_rises_and_falls() -> None:
    config = HealConfig(steps=100, lr=1.0)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert all(a > b for a, b in pairwise(rates[5:]))
    assert 0.1 < rates[-1] < 0.102
    assert [HealConfig(steps=1).rate(0)] == [HealConfig().lr]
