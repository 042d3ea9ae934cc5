"""The overlaid model runs what would be deployed, to the bit, and is afterwards the model that it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.alloc.masks import Drawn, straight_through
from rankwise.alloc.overlay import Overlay, frozen, overlaid
from rankwise.anatomy import block_linears
from rankwise.pipeline import compress
from rankwise.plan import LayerSpec, RankPlan

IDS = torch.randint(2, 512, (2, 24), generator=torch.Generator().manual_seed(3))
OPTIONS: dict[str, Any] = {"probe": False, "dense": True, "checkpointing": False}


def hard(size: int, keep: int | torch.Tensor, *, dense: bool = False) -> Drawn:
    """A drawn mask as training has it: hard in value, with a soft one's gradient."""
    soft = torch.full((size,), 0.3, requires_grad=True)
    kept = torch.arange(keep) if isinstance(keep, int) else keep
    mask = straight_through(torch.zeros(size).index_fill(0, kept, 1.0), soft)
    return Drawn(soft, mask, mask.sum(), keep, dense)


def mixed(shapes: dict[str, tuple[int, int]], kind: str) -> tuple[dict[str, Drawn], RankPlan]:
    """Masks and the plan that they stand for: prefixes of several ranks, any-k selections, dense layers."""
    drawn, specs = {}, {}
    for number, (name, (m, n)) in enumerate(shapes.items()):
        size, rank = min(m, n), 2 + number % 6
        indices = None
        if number % 5 == 0:
            drawn[name], specs[name] = hard(size, size, dense=True), LayerSpec("dense", m, n, size)
            continue
        if number % 3 == 0:
            indices = tuple(sorted(torch.randperm(size)[:rank].tolist()))
        drawn[name] = hard(size, rank if indices is None else torch.tensor(indices))
        specs[name] = LayerSpec(kind, m, n, rank, indices=indices)
    return drawn, RankPlan(specs)


def sizes_of(bench: Any) -> dict[str, int]:
    return {name: min(shape) for name, shape in bench.stores["one"].shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hard_masks_run_the_deployed_model_to_the_bit(
    family: str, dtype: torch.dtype, tiny: Callable[..., Any], workbench: Callable[..., Any], tmp_path: Path
) -> None:
    bench = workbench(tiny(family, dtype), family, dtype)
    drawn, plan = mixed(bench.stores["one"].shapes, "lowrank")
    with overlaid(bench.calibration(tmp_path, "one"), sizes_of(bench), **OPTIONS) as overlay:
        overlay.set(drawn)
        trained, _ = overlay.run(IDS, taps=False)
    deployed = compress(copy.deepcopy(bench.model), plan, bench.stores["one"])
    assert torch.equal(trained.detach(), deployed(input_ids=IDS, use_cache=False).logits)


def test_pivot_layers_are_the_same_function_in_other_arithmetic(bench: Any, tmp_path: Path) -> None:
    drawn, plan = mixed(bench.stores["two"].shapes, "pivot")
    with overlaid(bench.calibration(tmp_path), sizes_of(bench), **OPTIONS) as overlay:
        overlay.set(drawn)
        trained, _ = overlay.run(IDS, taps=False)
    deployed = compress(copy.deepcopy(bench.model), plan, bench.stores["two"])(input_ids=IDS).logits
    torch.testing.assert_close(trained.detach(), deployed, atol=2e-3, rtol=2e-3)
    assert not torch.equal(trained.detach(), bench.model(input_ids=IDS).logits)


def test_without_masks_and_with_probes_the_model_is_dense(bench: Any, tmp_path: Path) -> None:
    expected = bench.model(input_ids=IDS, use_cache=False).logits
    with overlaid(bench.calibration(tmp_path), sizes_of(bench), **(OPTIONS | {"probe": True})) as overlay:
        assert torch.equal(overlay.run(IDS, taps=False)[0], expected)
        overlay.set({name: hard(size, size, dense=True) for name, size in sizes_of(bench).items()})
        assert torch.equal(overlay.run(IDS, taps=False)[0].detach(), expected)


@pytest.mark.parametrize("probe", [False, True], ids=["faithful", "mended"])
def test_a_dense_layer_teaches_its_mask_only_through_the_probe(probe: bool, bench: Any, tmp_path: Path) -> None:
    sizes = sizes_of(bench)
    name = "model.layers.1.mlp.up_proj"
    drawn = {layer: hard(size, size, dense=layer == name) for layer, size in sizes.items()}
    with overlaid(bench.calibration(tmp_path), sizes, **(OPTIONS | {"probe": probe})) as overlay:
        overlay.set(drawn)
        overlay.run(IDS, taps=False)[0].square().mean().backward()
    assert (drawn[name].soft.grad is not None) == probe
    others = [drawn[layer].soft.grad for layer in sizes if layer != name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in others)
    if probe:  # the gradient is the one of a mask that keeps all
        whole = {layer: hard(size, size) for layer, size in sizes.items()}
        with overlaid(bench.calibration(tmp_path), sizes, **OPTIONS) as overlay:
            overlay.set(whole)
            overlay.run(IDS, taps=False)[0].square().mean().backward()
        torch.testing.assert_close(drawn[name].soft.grad, whole[name].soft.grad, rtol=1e-2, atol=1e-4)


def gradients(bench: Any, folder: Path, *, checkpointing: bool) -> list[torch.Tensor]:
    drawn, _ = mixed(bench.stores["two"].shapes, "pivot")
    with overlaid(
        bench.calibration(folder), sizes_of(bench), **(OPTIONS | {"checkpointing": checkpointing, "probe": True})
    ) as overlay:
        overlay.set(drawn)
        overlay.run(IDS, taps=True)[0].square().mean().backward()
    return [entry.soft.grad for entry in drawn.values() if entry.soft.grad is not None]


def test_checkpointing_changes_no_bit_of_the_gradients(bench: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = gradients(bench, tmp_path, checkpointing=False)
    torch.manual_seed(0)
    again = gradients(bench, tmp_path, checkpointing=True)
    assert len(plain) == len(sizes_of(bench))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_taps_are_the_hidden_states_that_transformers_shows(
    family: str, tiny: Callable[..., Any], workbench: Callable[..., Any], tmp_path: Path
) -> None:
    bench = workbench(tiny(family), family, torch.float32)
    with overlaid(bench.calibration(tmp_path), sizes_of(bench), **OPTIONS) as overlay:
        _, taps = overlay.run(IDS, taps=True)
        assert overlay.run(IDS, taps=False)[1] == []
    shown = bench.model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert torch.equal(taps[0], shown[1])  # of two blocks the first
    assert torch.equal(taps[1], shown[-1])


# --- afterwards -------------------------------------------------------------------------------------------------------


def footprint(model: Any) -> dict[str, Any]:
    """Everything about a model that running it could change."""
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    modules = {name: (m.training, sorted(m.__dict__), dict(m._forward_hooks)) for name, m in model.named_modules()}
    wanted = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    return {"state": state, "modules": modules, "wanted": wanted, "config": model.config.to_dict()}


def same(a: Any, b: Any) -> bool:
    tensors = all(
        a["state"][n][0] == b["state"][n][0] and torch.equal(a["state"][n][1], b["state"][n][1]) for n in a["state"]
    )
    return tensors and all(a[key] == b[key] for key in ("modules", "wanted", "config"))


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_the_model_is_left_as_it_was(fails: bool, tiny: Callable[..., Any], tmp_path: Path, bench: Any) -> None:
    model = copy.deepcopy(bench.model).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(True)
    changed = copy.copy(bench)
    changed.model = model
    before = footprint(model)

    def work(overlay: Overlay) -> None:
        overlay.set({name: hard(size, 3) for name, size in sizes_of(bench).items()})
        overlay.run(IDS, taps=True)[0].sum().backward()
        assert not same(before, footprint(model))
        if fails:
            raise InterruptedError

    try:
        with overlaid(changed.calibration(tmp_path), sizes_of(bench), **(OPTIONS | {"checkpointing": True})) as overlay:
            work(overlay)
    except InterruptedError:
        assert fails
    assert same(before, footprint(model))


def test_a_forward_put_there_by_others_comes_back(bench: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(bench.model)
    linear = next(iter(block_linears(model)[0].values()))
    own = linear.forward
    linear.forward = lambda x: 2 * own(x)  # as accelerate's hooks do
    theirs, changed = linear.forward, copy.copy(bench)
    changed.model = model
    with overlaid(changed.calibration(tmp_path), sizes_of(bench), **OPTIONS):
        assert linear.forward is not theirs
    assert linear.forward is theirs


def test_frozen_models_need_no_gradient_and_no_dropout(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2").train().requires_grad_(True)
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
