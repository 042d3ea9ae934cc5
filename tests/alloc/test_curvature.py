"""Streamed second moments against one plain forward and backward of the whole model; and what a kill leaves behind."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensors import DEVICE
from torch import nn

from rankwise.alloc import sweeps
from rankwise.alloc.curvature import Curvature, collect, model_hash
from rankwise.alloc.moments import OCTAVES
from rankwise.anatomy import block_linears
from rankwise.errors import RankwiseError
from rankwise.jobs import locked

CPU = torch.device("cpu")
FAMILIES = ["llama", "gpt2", "opt", "gemma3", "phi3"]


def draw(count: int, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 512, (count, length), generator=torch.Generator().manual_seed(seed))


WINDOWS, GRADIENT_WINDOWS = draw(3), draw(2, seed=2)


def measure(
    model: Any, folder: Path, gradient_windows: torch.Tensor | None = GRADIENT_WINDOWS, **options: Any
) -> Curvature:
    return collect(model, WINDOWS, gradient_windows, folder, device=CPU, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def moments(curvature: Curvature, side: str) -> dict[str, torch.Tensor]:
    read = getattr(curvature, side)
    return {name: matrix for index in range(curvature.blocks) for name, matrix in read(index).items()}


def reference(model: Any, windows: torch.Tensor, gradients: torch.Tensor, seed: int) -> tuple[dict[str, Any], ...]:
    """`inputs`, `outputs`, `weighted`, `emphasis` of every linear layer by hooks on the whole model, summed in fp64."""
    model = copy.deepcopy(model).requires_grad_(True)
    layers = {name: layer for block in block_linears(model) for name, layer in block.items()}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, out: torch.Tensor) -> None:
            out.retain_grad()
            seen[name] = (args[0], out)

        return hook

    for name, layer in layers.items():
        layer.register_forward_hook(keep(name))
    inputs, outputs, weighted = (dict.fromkeys(layers, 0.0) for _ in range(3))
    sizes = {name: torch.zeros(windows.shape[1], dtype=torch.float64) for name in layers}  # by position
    for window in windows:
        model(input_ids=window[None], use_cache=False)
        for name, (x, _) in seen.items():
            rows = x.detach().double().reshape(-1, x.shape[-1])
            inputs[name] = inputs[name] + rows.T @ rows / windows.numel()
    for number, window in enumerate(gradients):
        logits = model(input_ids=window[None], use_cache=False).logits[0].float()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        (-logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()).backward()
        for name, (x, y) in seen.items():
            assert y.grad is not None
            rows = zip(x.detach().double().flatten(0, -2), y.grad.double().flatten(0, -2), strict=True)
            for position, (row, g) in enumerate(rows):
                size = float(g @ g)
                sizes[name][position] += size / gradients.numel()
                if size > 1e-10 * float(y.grad.norm(dim=-1).max()) ** 2:  # the first token's at q and k is noise
                    outputs[name] = outputs[name] + torch.outer(g, g) / (size * gradients.numel())
                weighted[name] = weighted[name] + size * torch.outer(row, row) / gradients.numel()
    emphasis = {}
    for name, size in sizes.items():
        outputs[name], weighted[name] = outputs[name] * size.sum(), weighted[name] / size.sum()
        starts = [part.mean() / size.mean() for part in (size[:1], size[1:3], size[3:7], size[7:15], size[15:])]
        emphasis[name] = 0.5 + torch.stack(starts + starts[-1:] * (OCTAVES - len(starts))) / 2
    return inputs, outputs, weighted, emphasis


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 3])
def test_moments_equal_those_of_the_whole_model(
    seed: int, family: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(family)
    curvature = measure(model, tmp_path, seed=seed)
    names = [name for block in block_linears(model) for name in block]
    found_by = reference(model, WINDOWS, GRADIENT_WINDOWS, seed)
    for side, expected in zip(("inputs", "outputs", "weighted", "emphasis"), found_by, strict=True):
        found = moments(curvature, side)
        assert sorted(found) == sorted(names)
        for name in names:
            assert float(expected[name].norm()) > 0
            assert relative_error(found[name], expected[name]) < 1e-4, (side, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitudes_equal_those_of_the_whole_model(family: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny(family)
    curvature = measure(model, tmp_path, None)
    expected: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any) -> None:
            rows = args[0].detach().double().reshape(-1, args[0].shape[-1])
            expected[name] = expected.get(name, 0.0) + rows.abs().sum(0) / WINDOWS.numel()

        return hook

    for block in block_linears(model):
        for name, layer in block.items():
            layer.register_forward_pre_hook(keep(name))
    for window in WINDOWS:
        model(input_ids=window[None], use_cache=False)
    for index, block in enumerate(block_linears(model)):
        found = curvature.magnitudes(index)
        assert sorted(found) == sorted(block)
        for name, sizes in found.items():
            assert sizes.dtype == torch.float32
            assert sizes.shape == (len(curvature.inputs(index)[name]),)
            assert relative_error(sizes, expected[name]) < 1e-5, name


def test_bf16_models_are_summed_in_fp32(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama", torch.bfloat16)
    curvature = measure(model, tmp_path)
    expected = reference(model, WINDOWS, GRADIENT_WINDOWS, 0)[0]
    for name, matrix in moments(curvature, "inputs").items():
        assert matrix.dtype == torch.float32
        assert relative_error(matrix, expected[name]) < 1e-4, name


def test_sampled_labels_follow_the_seed(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    first, again, other = (measure(model, tmp_path / name, seed=seed) for name, seed in [("a", 1), ("b", 1), ("c", 2)])
    assert contents(first.folder) == contents(again.folder)
    name = "model.layers.1.mlp.down_proj"
    assert relative_error(other.outputs(1)[name], first.outputs(1)[name].double()) > 1e-2
    assert torch.equal(other.inputs(1)[name], first.inputs(1)[name])


@pytest.mark.parametrize(
    ("family", "leaders"),
    [
        ("llama", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]),
        ("opt", ["self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]),
        ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    ],
)
def test_shared_inputs_lie_on_disk_once(
    family: str, leaders: list[str], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(family)
    curvature = measure(model, tmp_path, None)
    for index in range(2):
        assert len(load_file(curvature.file("inputs", index))) == 2 * len(leaders)  # moments and magnitudes
    found = curvature.inputs(1)
    prefix = next(iter(found)).split(".1.")[0]
    assert sorted(found) == sorted(block_linears(model)[1])
    if family == "llama":
        assert found[f"{prefix}.1.self_attn.k_proj"] is found[f"{prefix}.1.self_attn.q_proj"]
        assert found[f"{prefix}.1.mlp.up_proj"] is found[f"{prefix}.1.mlp.gate_proj"]


def test_a_layer_never_called_has_zero_moments(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].spare = nn.Linear(32, 48).requires_grad_(False)
    curvature = measure(model, tmp_path)
    name = "model.layers.1.spare"
    assert torch.equal(curvature.inputs(1)[name], torch.zeros(32, 32))
    assert torch.equal(curvature.magnitudes(1)[name], torch.zeros(32))
    assert torch.equal(curvature.outputs(1)[name], torch.zeros(48, 48))
    assert torch.equal(curvature.weighted(1)[name], torch.zeros(32, 32))


def test_only_moments_stay_in_the_folder(tiny: Callable[..., Any], tmp_path: Path) -> None:
    measure(tiny("llama"), tmp_path)
    kept = [f"{what}_{index:03d}.safetensors" for what in ("inputs", "outputs") for index in range(2)]
    assert sorted(contents(tmp_path)) == ["curvature.json", *kept]


def test_model_and_its_parameters_are_left_alone(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_models_straight_from_transformers_will_do(tiny: Callable[..., Any], tmp_path: Path) -> None:
    frozen = measure(tiny("llama"), tmp_path / "frozen")
    model = tiny("llama").requires_grad_(True)  # as `from_pretrained` returns them
    trainable = measure(model, tmp_path / "trainable")
    assert all(parameter.grad is None for parameter in model.parameters())
    for side in ("inputs", "outputs"):
        for name, matrix in moments(frozen, side).items():
            assert relative_error(moments(trainable, side)[name], matrix.double()) < 1e-5


# --- killed and run again ---------------------------------------------------------------------------------------------


class Killer:
    """Raises at the n-th event that it is told of."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def event(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise InterruptedError

    def watch_writes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        write = sweeps.write_tensors

        def watched(*args: Any) -> None:
            self.event()
            write(*args)
            self.event()

        monkeypatch.setattr(sweeps, "write_tensors", watched)

    def watch_removals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        unlink = Path.unlink

        def watched(path: Path, missing_ok: bool = False) -> None:
            if not path.name.startswith("."):  # the parts of atomic writes
                self.event()
            unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(Path, "unlink", watched)

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        yield self.event


def run_killed(watch: str, at: int | None, model: Any, folder: Path, windows: torch.Tensor | None) -> int:
    """Collect until the n-th event; return how many there were."""
    killer = Killer(at)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if watch == "writes":
            killer.watch_writes(monkeypatch)
        if watch == "removals":
            killer.watch_removals(monkeypatch)
        options = {"track": killer.track} if watch == "progress" else {}
        if at is None:
            measure(model, folder, windows, **options)
        else:
            with pytest.raises(InterruptedError):
                measure(model, folder, windows, **options)
    return killer.count


@pytest.mark.parametrize("sides", ["one-sided", "two-sided"])
@pytest.mark.parametrize("watch", ["writes", "removals", "progress"])
def test_killed_anywhere_the_next_run_makes_the_same_bytes(
    watch: str, sides: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model, windows = tiny("llama"), None if sides == "one-sided" else GRADIENT_WINDOWS
    events = run_killed(watch, None, model, tmp_path / "whole", windows)
    assert events >= (0 if watch == "removals" and windows is None else 2)
    expected = contents(tmp_path / "whole")
    for at in range(1, events + 1):
        folder = tmp_path / str(at)
        run_killed(watch, at, model, folder, windows)
        measure(model, folder, windows)
        assert contents(folder) == expected, f"killed at event {at} of {events}"


def test_killed_again_and_again_it_still_gets_there(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("gpt2")
    measure(model, tmp_path / "whole")
    for _ in range(30):  # each run gets two writes further
        try:
            run_killed("writes", 4, model, tmp_path / "parts", GRADIENT_WINDOWS)
        except pytest.fail.Exception:
            break  # it ended: nothing left to write
    else:
        pytest.fail("no progress")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_finished_blocks_are_not_measured_again(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    first = measure(model, tmp_path)

    def fail(*args: Any) -> None:
        pytest.fail("the model was run")

    monkeypatch.setattr("rankwise.alloc.curvature.BlockStream", fail)
    assert measure(model, tmp_path).identity == first.identity
    assert measure(model, tmp_path, None).identity == first.identity  # what is there beyond the need does no harm
    assert measure(model, tmp_path, None, seed=9).identity == first.identity  # inputs know no labels


def test_the_way_back_does_not_begin_with_the_way_there(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    run_killed("writes", 14, model, tmp_path, GRADIENT_WINDOWS)  # the last block's output moments are there
    names = []

    @contextmanager
    def track(name: str, total: int) -> Iterator[Callable[[], None]]:
        names.append(name)
        yield lambda: None

    measure(model, tmp_path, track=track)
    assert names == ["output-gradient moments"]


@pytest.mark.parametrize("killed", [None, 1, 3], ids=["whole", "killed-early", "killed-late"])
def test_output_moments_may_be_added_later(killed: int | None, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    measure(model, tmp_path / "at-once", seed=4)
    if killed is None:
        one = measure(model, tmp_path / "later", None, seed=0)
        assert one.has_inputs
        assert not one.has_outputs
    else:
        run_killed("writes", killed, model, tmp_path / "later", None)
    assert measure(model, tmp_path / "later", seed=4).has_outputs
    assert contents(tmp_path / "later") == contents(tmp_path / "at-once")


@pytest.mark.parametrize("at", range(1, 21))
def test_a_one_sided_run_in_between_does_not_block_the_way(at: int, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    measure(model, tmp_path / "whole")
    run_killed("writes", at, model, tmp_path / "parts", GRADIENT_WINDOWS)
    measure(model, tmp_path / "parts", None)
    measure(model, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("removal", [1, 2, 3, 4])
def test_a_kill_while_cleaning_up_does_not_block_the_way(
    removal: int, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("llama")
    measure(model, tmp_path / "whole")
    run_killed("removals", removal, model, tmp_path / "parts", GRADIENT_WINDOWS)
    measure(model, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_one_sided_run_leaves_an_unfinished_way_back_alone(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    measure(model, tmp_path / "whole")
    run_killed("writes", 14, model, tmp_path / "parts", GRADIENT_WINDOWS)
    assert Curvature(tmp_path / "parts", {"blocks": 2}).on_the_way_back
    measure(model, tmp_path / "parts", None)
    assert Curvature(tmp_path / "parts", {"blocks": 2}).on_the_way_back
    measure(model, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_parts_left_by_a_killed_process_are_no_foreign_files(tiny: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / ".curvature.json.part").write_text("{")
    (tmp_path / ".inputs_000.safetensors.part").write_text("x")
    assert measure(tiny("llama"), tmp_path, None).has_inputs


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "windows", "gradient_windows", "seed", "model_seed"),
    [
        pytest.param("text", draw(3, seed=8), GRADIENT_WINDOWS, 0, 0, id="text"),
        pytest.param("text", draw(4), GRADIENT_WINDOWS, 0, 0, id="more-text"),
        pytest.param("gradient_text", WINDOWS, draw(2, seed=8), 0, 0, id="gradient-text"),
        pytest.param("seed", WINDOWS, GRADIENT_WINDOWS, 1, 0, id="seed"),
        pytest.param("model", WINDOWS, GRADIENT_WINDOWS, 0, 1, id="weights"),
    ],
)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed"])
def test_other_work_in_the_folder_is_named_by_its_key(
    finished: bool,
    key: str,
    windows: torch.Tensor,
    gradient_windows: torch.Tensor,
    seed: int,
    model_seed: int,
    tiny: Callable[..., Any],
    tmp_path: Path,
) -> None:
    run_killed("writes", None if finished else 4, tiny("llama"), tmp_path, GRADIENT_WINDOWS)
    before = contents(tmp_path)
    model = tiny("llama", seed=model_seed)
    with pytest.raises(RankwiseError, match=rf"was made with {key} ") as caught:
        collect(model, windows, gradient_windows, tmp_path, device=CPU, seed=seed)
    assert caught.value.field == "curvature"
    assert str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == before


def test_the_same_weights_in_another_dtype_are_another_model(tiny: Callable[..., Any], tmp_path: Path) -> None:
    measure(tiny("llama"), tmp_path, None)
    with pytest.raises(RankwiseError, match="was made with model"):
        measure(tiny("llama", torch.bfloat16), tmp_path, None)


@pytest.mark.parametrize("part", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "bias"])
def test_a_model_that_differs_outside_its_linear_weights_is_another_model(
    part: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    family, name = ("qwen2", "model.layers.0.self_attn.q_proj.bias") if part == "bias" else ("llama", part)
    measure(tiny(family), tmp_path, None)
    model = tiny(family)
    model.get_parameter(name).mul_(1.5)
    with pytest.raises(RankwiseError, match="was made with model"):
        measure(model, tmp_path, None)


def test_a_folder_with_other_things_in_it_is_left_alone(tiny: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RankwiseError, match=r"no curvature\.json in it"):
        measure(tiny("llama"), tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("index", ["{}", '{"format": 99}', "{", ""])
def test_a_damaged_index_is_said(index: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "curvature.json").write_text(index)
    with pytest.raises(RankwiseError):
        measure(tiny("llama"), tmp_path)


def test_two_runs_do_not_share_a_folder(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RankwiseError, match="another process"):
        measure(tiny("llama"), tmp_path)


def test_bad_weights_are_named_before_anything_is_measured(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(RankwiseError, match="NaN or Inf") as caught:
        measure(model, tmp_path / "curvature")
    assert caught.value.field == "model.layers.1.mlp.up_proj.weight"
    assert not (tmp_path / "curvature").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_bad_numbers_outside_the_linear_layers_come_to_light(
    name: str, value: float, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("qwen3")
    model.get_parameter(name)[..., 3] = value
    with pytest.raises(RankwiseError, match="NaN or Inf") as caught:
        measure(model, tmp_path)
    block = 0 if "embed" in name else 1
    assert caught.value.field == f"model.layers.{block}.self_attn.q_proj"
    assert not (tmp_path / f"inputs_{block:03d}.safetensors").exists()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e20), (torch.float16, 2e3)], ids=["fp32", "fp16"])
def test_activations_that_overflow_are_named(
    dtype: torch.dtype, scale: float, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("llama", dtype)
    model.model.layers[1].mlp.up_proj.weight.mul_(scale)
    model.model.layers[1].mlp.gate_proj.weight.mul_(scale)
    with pytest.raises(RankwiseError, match="NaN or Inf in its input activations") as caught:
        measure(model, tmp_path)
    assert caught.value.field == "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_bad_numbers_behind_the_blocks_come_to_light(name: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("qwen2")
    model.get_parameter(name)[..., 3] = float("nan")
    assert measure(model, tmp_path / "one", None).has_inputs  # the blocks never see it
    with pytest.raises(RankwiseError):
        measure(model, tmp_path / "two")


def test_gradient_windows_of_another_length_are_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RankwiseError):
        measure(tiny("llama"), tmp_path, draw(2, 16))


def test_identity_is_written_for_people_to_read(tiny: Callable[..., Any], tmp_path: Path) -> None:
    curvature = measure(tiny("llama"), tmp_path, seed=5)
    identity = json.loads((tmp_path / "curvature.json").read_text())
    assert identity == curvature.identity
    expected = {"format": 3, "blocks": 2, "samples": 3, "gradient_samples": 2, "seq_len": 24, "seed": 5}
    assert {key: identity[key] for key in expected} == expected


def test_a_model_has_one_hash_wherever_it_is(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    known = model_hash(model)
    assert model_hash(model.to(DEVICE)) == known
    next(model.parameters()).view(-1)[0] += 1
    assert model_hash(model) != known
