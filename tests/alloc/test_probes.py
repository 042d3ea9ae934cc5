"""Losses with one layer truncated, against the whole model with that one weight replaced."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from rankwise.alloc import probes as module
from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import collect
from rankwise.alloc.probes import Probes, measure_probes
from rankwise.alloc.store import factorize_model
from rankwise.anatomy import block_linears, weight_of
from rankwise.errors import RankwiseError

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, 512, (3, 24), generator=torch.Generator().manual_seed(1))


def calibrate(model: Any, folder: Path, sides: str = "one") -> Calibration:
    curvature = collect(model, WINDOWS, None, folder / "curvature", device=CPU)
    store = factorize_model(model, curvature, folder / f"factors-{sides}", sides=sides, device=CPU)
    (folder / "probes").mkdir(exist_ok=True)
    return Calibration(model, store, curvature, WINDOWS, folder / "probes", CPU)


@torch.no_grad()
def full_loss(model: Any, windows: torch.Tensor) -> float:
    total = sum(
        float(cross_entropy(model(input_ids=w[None]).logits[0, :-1].float(), w[1:], reduction="sum")) for w in windows
    )
    return total / (windows.numel() - len(windows))


@torch.no_grad()
def replaced_loss(calibration: Calibration, name: str, rank: int, windows: torch.Tensor) -> float:
    model = copy.deepcopy(calibration.model)
    u, v = calibration.factors.load(name, rank)
    weight_of(model.get_submodule(name)).copy_(u @ v)
    return full_loss(model, windows)


def dies(at: int) -> Callable[..., Any]:
    """A progress report that ends the run at its n-th step."""
    count = 0

    @contextmanager
    def track(name: str, total: int) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            nonlocal count
            count += 1
            if count == at:
                raise InterruptedError

        yield advance

    return track


def ranks_of(calibration: Calibration, ranks: list[int]) -> dict[str, list[int]]:
    return {name: [r for r in ranks if r < min(shape)] for name, shape in calibration.factors.shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_losses_are_those_of_the_whole_model(
    family: str, dtype: torch.dtype, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    calibration = calibrate(tiny(family, dtype), tmp_path)
    found = measure_probes(calibration, ranks_of(calibration, [3, 11]), 2, "one")
    assert found.dense == pytest.approx(full_loss(calibration.model, WINDOWS[:2]), rel=1e-6)
    assert len(found.losses) == 2 * len(calibration.factors.shapes)
    for (name, rank), loss in found.losses.items():
        assert loss == pytest.approx(replaced_loss(calibration, name, rank, WINDOWS[:2]), rel=1e-6), name
        assert loss != found.dense


def test_the_model_is_left_as_it_was(tiny: Callable[..., Any], tmp_path: Path) -> None:
    calibration = calibrate(tiny("gpt2", torch.bfloat16).requires_grad_(True), tmp_path)
    before = {name: tensor.clone() for name, tensor in calibration.model.state_dict().items()}
    calibration.track = dies(3)
    with pytest.raises(InterruptedError):
        measure_probes(calibration, ranks_of(calibration, [2, 5]), 1, "one")
    after = calibration.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_failing_forward_leaves_the_weight_in_place(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = calibrate(tiny("llama"), tmp_path)
    before = {name: tensor.clone() for name, tensor in calibration.model.state_dict().items()}
    run, count = module.BlockStream.run, 0

    def fails(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 2:
            raise torch.OutOfMemoryError
        return run(*args)

    monkeypatch.setattr(module.BlockStream, "run", fails)
    with pytest.raises(torch.OutOfMemoryError):
        measure_probes(calibration, ranks_of(calibration, [2, 5]), 1, "one")
    after = calibration.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("at", [1, 2, 9, 28, 29])
def test_killed_anywhere_what_was_measured_is_not_measured_again(
    at: int, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = calibrate(tiny("llama"), tmp_path)
    ranks = ranks_of(calibration, [3, 11])  # 28 probes
    whole = measure_probes(calibration, ranks, 2, "one")
    expected = whole.path.read_bytes()
    whole.path.unlink()
    calibration.track = dies(at)
    with pytest.raises(InterruptedError):
        measure_probes(calibration, ranks, 2, "one")
    rows = json.loads(whole.path.read_text())["probes"]
    assert len(rows) == min(at, 28)
    measured, loss = 0, module._loss

    def counted(*args: Any) -> float:
        nonlocal measured
        measured += 1
        return loss(*args)

    monkeypatch.setattr(module, "_loss", counted)
    calibration.track = dies(0)
    again = measure_probes(calibration, ranks, 2, "one")
    assert again.path.read_bytes() == expected
    assert measured == 28 - len(rows) + (at < 29)


def test_a_finished_file_needs_no_model(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = calibrate(tiny("llama"), tmp_path)
    first = measure_probes(calibration, ranks_of(calibration, [3, 11]), 2, "one")
    monkeypatch.setattr(module, "BlockStream", lambda *args: pytest.fail("the model was run"))
    again = measure_probes(calibration, ranks_of(calibration, [11]), 2, "one")  # what is there beyond the need is kept
    assert (again.dense, again.losses) == (first.dense, first.losses)


@pytest.mark.parametrize("change", ["text", "samples", "model", "calibration text"])
def test_losses_of_something_else_are_refused(change: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    calibration = calibrate(tiny("llama"), tmp_path)
    measure_probes(calibration, {"model.layers.1.mlp.up_proj": [4]}, 2, "one")
    samples = 1 if change == "samples" else 2
    if change == "text":
        calibration.windows = WINDOWS.flip(1)
    if change == "model":
        calibration.curvature.identity["model"] = "0123456789abcdef"
    if change == "calibration text":
        calibration.curvature.identity["text"] = "0123456789abcdef"
    key = {"text": "probe_text", "samples": "probe_samples, probe_text", "calibration text": "text"}.get(change, change)
    with pytest.raises(RankwiseError, match=f"made with other {key};") as caught:
        measure_probes(calibration, {"model.layers.1.mlp.up_proj": [4]}, samples, "one")
    assert caught.value.field == "probes"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"identity": {}, "dense": 1}', '{"identity": 3, "probes": []}'])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "probes_one.json"
    path.write_text(text)
    with pytest.raises(RankwiseError) as caught:
        Probes(path, {"model": "a"})
    assert caught.value.field == str(path)


def test_metrics_keep_their_own_files(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    for sides in ("one", "diagonal"):
        measure_probes(calibrate(model, tmp_path, sides), {"model.layers.1.mlp.up_proj": [4]}, 2, sides)
    one, diagonal = (json.loads((tmp_path / "probes" / f"probes_{s}.json").read_text()) for s in ("one", "diagonal"))
    assert one["dense"] == diagonal["dense"]
    assert one["probes"][0]["loss"] != diagonal["probes"][0]["loss"]


def test_losses_that_are_no_number_survive_the_file(tmp_path: Path) -> None:
    found = Probes(tmp_path / "probes.json", {"model": "a"})
    found.add("layer", 3, float("inf"))
    found.add("layer", 4, 1.0 / 3.0)
    assert Probes(tmp_path / "probes.json", {"model": "a"}).losses == {
        ("layer", 3): float("inf"),
        ("layer", 4): 1.0 / 3.0,
    }


def test_a_model_whose_loss_is_no_number_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("qwen2")
    calibration = calibrate(model, tmp_path)
    model.get_parameter("lm_head.weight")[..., 3] = float("nan")
    with pytest.raises(RankwiseError, match="before any layer is truncated"):
        measure_probes(calibration, {}, 2, "one")


def test_windows_are_needed(tiny: Callable[..., Any], tmp_path: Path) -> None:
    calibration = calibrate(tiny("llama"), tmp_path)
    calibration.windows = WINDOWS[:0]
    with pytest.raises(RankwiseError, match="at least one of two tokens"):
        measure_probes(calibration, {}, 2, "one")


def test_a_layer_never_called_changes_nothing(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[0].spare = torch.nn.Linear(32, 16).requires_grad_(False)
    calibration = calibrate(model, tmp_path)
    assert "model.layers.0.spare" in block_linears(model)[0]
    found = measure_probes(calibration, {"model.layers.0.spare": [3]}, 2, "one")
    assert found.losses["model.layers.0.spare", 3] == found.dense
