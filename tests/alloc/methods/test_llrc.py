"""LLRC: its losses, its threshold, and the very components that it learnt to keep."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.alloc.bank import Bank
from rankwise.alloc.methods import Llrc
from rankwise.alloc.methods.trained import Task
from rankwise.alloc.objectives import distillation_loss, total_variation
from rankwise.alloc.train import Step
from rankwise.errors import RankwiseError
from rankwise.pipeline import compress
from rankwise.plan import LayerSpec, RankPlan

SHAPES = {"a": (48, 32), "b": (32, 32), "c": (16, 32)}


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def task_of(method: Llrc) -> Task:
    energies = {name: np.linspace(2, 1, min(shape)) for name, shape in SHAPES.items()}
    scores: Any = SimpleNamespace(shapes=SHAPES, originals=SHAPES, removed={}, energies=energies)
    return method._task(method.choices(SHAPES, energies), scores, 0)


def scattered(method: Llrc, task: Task, seed: int = 0) -> tuple[Bank, dict[str, np.ndarray]]:
    bank, generator = method._bank(task), noise(seed)
    for mask in bank.masks:
        mask.get_parameter("logits").data = torch.randn(mask.size, generator=generator)
    logits = [mask.get_parameter("logits").detach().double().numpy() for mask in bank.masks]
    return bank, dict(zip(bank.names, logits, strict=True))


def step_of(task: Task, bank: Bank, number: int) -> Step:
    drawn = bank.draw(noise(3))
    shares = {name: task.ledger.curves[name].share(entry.rank) for name, entry in drawn.items()}
    taps = [torch.randn(1, 5, 4, generator=noise(seed)) for seed in (1, 2)]
    return Step(number, torch.zeros(1, 5), torch.zeros(1, 5, 9), drawn, shares, taps, [tap + 0.1 for tap in taps])


def test_the_loss_by_hand() -> None:
    method = Llrc(0.1, rank_multiple=1, steps=80, compression=2.0, distillation=0.5, variation=0.3)
    task = task_of(method)
    bank, logits = scattered(method, task)
    for number, pressure in ((0, 0.0), (5, 1.0), (10, 2.0), (20, 0.0)):  # a cycle is a quarter of the steps
        step = step_of(task, bank, number)
        _, terms = method._objective(task, bank)(step)
        mean = np.mean([values.mean() for values in logits.values()])
        assert float(terms["compression"].detach()) == pytest.approx(pressure * mean, abs=1e-6)
    assert float(terms["distillation"]) == pytest.approx(0.5 * float(distillation_loss(step.taps, step.teacher)))
    switches = [float(total_variation(drawn.mask.detach())) for drawn in step.drawn.values()]
    assert float(terms["variation"].detach()) == pytest.approx(0.3 * np.mean(switches))


def test_pressure_ends_at_the_budget() -> None:
    method = Llrc(1.0, steps=80)
    task = task_of(method)
    bank, _ = scattered(method, task)
    ratio, terms = method._objective(task, bank)(step_of(task, bank, 10))
    assert float(ratio.detach()) < 1
    assert float(terms["compression"].detach()) == 0


def test_the_papers_start_keeps_all_and_the_middle_ones_are_prefixes() -> None:
    method = Llrc(0.5)
    assert [float(mask.get_parameter("logits")[0].detach()) for mask in method._bank(task_of(method)).masks] == [
        6,
        6,
        6,
    ]
    uniform = Llrc(0.5, start="uniform", selection="top-k")
    task = task_of(uniform)
    for name, rank in uniform._bank(task).ranks().items():
        assert task.ledger.curves[name].share(rank) == pytest.approx(0.5, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.15, 0.95), st.sampled_from([1, 4, 8]), st.sampled_from([("pivot",), ("lowrank",)]), st.integers(0, 50)
)
def test_one_threshold_decides_for_all_layers(ratio: float, multiple: int, kinds: tuple[str, ...], seed: int) -> None:
    method = Llrc(ratio, kinds, multiple, tolerance=0.3)
    task = task_of(method)
    _, logits = scattered(method, task, seed)
    target = ratio * task.ledger.total
    if not sum(e.cost[0] for e in task.choices.values()) <= target <= sum(e.cost[-1] for e in task.choices.values()):
        return
    threshold, picked = method._cut(task, logits, target)
    cost = sum(int(task.choices[name].cost[at]) for name, at in picked.items())
    assert cost <= target
    for name, at in picked.items():
        above, entry = int((logits[name] > threshold).sum()), task.choices[name]
        smaller_ones = entry.rank[entry.rank <= above]
        assert entry.rank[at] == (smaller_ones[-1] if len(smaller_ones) else entry.rank[0])
    values = np.sort(np.concatenate(list(logits.values())))
    lower = values[values <= threshold][: -multiple * 3]  # so many more cannot be had without another step somewhere
    if len(lower) and multiple == 1 and kinds == ("lowrank",):
        again = {
            name: method._at_count(e, task.ledger.curves[name], int((logits[name] > lower[-1]).sum()))
            for name, e in task.choices.items()
        }
        assert again == picked or sum(int(task.choices[n].cost[i]) for n, i in again.items()) > target


def allocate(method: Llrc, seed: int) -> tuple[dict[str, LayerSpec], dict[str, np.ndarray]]:
    task = task_of(method)
    bank, logits = scattered(method, task, seed)
    choices, picked = method._settle(task, bank)
    specs = {}
    for name, at in picked.items():
        kind, rank = choices[name].kind[at], int(choices[name].rank[at])
        specs[name] = method.spec(name, kind, rank, task.scores, "fp32", method._kept(choices[name], at))
    return specs, logits


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_any_k_keeps_exactly_the_components_of_the_highest_logits(multiple: int, seed: int) -> None:
    specs, logits = allocate(Llrc(0.5, ("pivot",), multiple, sides="two"), seed)
    for name, spec in specs.items():
        expected = sorted(np.argsort(-logits[name])[: spec.rank].tolist())
        assert list(spec.indices or range(spec.rank)) == expected
        assert spec.rank % multiple == 0
        energy = np.linspace(2, 1, min(SHAPES[name]))
        assert spec.energy == pytest.approx(energy[expected].sum() / energy.sum())
        assert spec.loss == pytest.approx((energy.sum() - energy[expected].sum()) / 2)
    assert any(spec.indices is not None for spec in specs.values())


def test_top_k_keeps_as_many_of_the_first() -> None:
    specs, _ = allocate(Llrc(0.5, ("pivot",), 1, selection="top-k"), 0)
    assert all(spec.indices is None for spec in specs.values())
    assert len({spec.rank for spec in specs.values()}) > 1


@pytest.mark.parametrize(("above", "dense"), [(1.0, False), (0.6, True)])
def test_layers_above_a_threshold_become_dense_again(above: float, dense: bool) -> None:
    method = Llrc(0.7, ("dense", "lowrank"), 1, dense_above=above)
    task = task_of(method)
    entry, curve = task.choices["a"], task.ledger.curves["a"]
    assert (entry.kind[method._at_count(entry, curve, 12)] == "dense") == dense  # 12 of 19.2: 0.625
    assert entry.rank[method._at_count(entry, curve, 5)] == 5
    assert entry.kind[method._at_count(entry, curve, 20)] == "dense"


def test_the_checkpoint_keeps_the_components_that_were_learnt(bench: Any, tmp_path: Path) -> None:
    """From training to layers: the factors in place are the ones with the highest logits."""
    method = Llrc(0.6, ("pivot", "lowrank"), 1, 0.02, steps=30, train_len=16, lr=0.5)
    store = bench.stores[method.sides]
    plan = method.allocate(store, "fp32", bench.calibration(tmp_path, method.sides))
    chosen = {name: spec for name, spec in plan if spec.indices is not None}
    assert chosen
    model = compress(copy.deepcopy(bench.model), plan, store)
    for name, spec in chosen.items():
        u, v = store.load(name, min(spec.out_features, spec.in_features))
        kept = list(spec.indices or ())
        x = torch.randn(3, spec.in_features, generator=noise())
        torch.testing.assert_close(model.get_submodule(name)(x), x @ (u[:, kept] @ v[kept]).T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("selection", "best-k"),
        ("temperature", 0.0),
        ("compression", -1.0),
        ("variation", "much"),
        ("period", 0),
        ("after", -1),
        ("dense_above", 1.5),
    ],
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(RankwiseError) as caught:
        Llrc(**{option: value})
    assert caught.value.field == option


def test_a_plan_read_back_keeps_its_components() -> None:
    method = Llrc(0.5, ("pivot",), 1, sides="two")
    specs, _ = allocate(method, 0)
    plan = RankPlan.from_dict(json.loads(json.dumps(RankPlan(specs).to_dict())))
    again = method.restate(plan, task_of(method).scores, "fp32")
    assert again.layers == specs


def test_the_factors_are_asvds() -> None:
    assert Llrc().sides == "diagonal"
