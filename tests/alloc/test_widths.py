"""Which channels go: under a budget, against ranks, by what the metric says; and what the layers are without them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise
from rankwise.alloc import widths
from rankwise.alloc.channels import Channels
from rankwise.alloc.curvature import Curvature, collect
from rankwise.alloc.factors import definite
from rankwise.alloc.removal import without
from rankwise.alloc.spectra import Block
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.alloc.widths import choose_channels
from rankwise.anatomy import block_linears, weight_of
from rankwise.errors import RankwiseError

CPU = torch.device("cpu")
DOWN = "model.layers.{}.mlp.down_proj"
FAMILIES = pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])


@dataclass
class Bench:
    """A model, its curvature and text."""

    model: Any
    curvature: Curvature
    windows: torch.Tensor

    def choose(self, folder: Path, ratio: float = 0.6, planned: dict[str, int] | None = None, **more: Any) -> Channels:
        method = rankwise.Global(ratio, **({"rank_multiple": 1, "channel_multiple": 4} | more))
        where: dict[str, Any] = {"device": CPU, "planned": planned}
        return choose_channels(self.model, self.curvature, method, self.windows[:1], folder, **where)

    def factors(self, folder: Path, channels: Channels | None) -> FactorStore:
        how: dict[str, Any] = {"sides": "two", "device": CPU, "channels": channels}
        return factorize_model(self.model, self.curvature, folder, **how)


@pytest.fixture
def bench(tiny: Callable[..., Any], tmp_path: Path) -> Callable[..., Bench]:
    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> Bench:
        model = tiny(family, dtype)
        windows = torch.randint(2, 512, (16, 32), generator=torch.Generator().manual_seed(5))
        return Bench(model, collect(model, windows, windows, tmp_path / "curvature", device=CPU), windows)

    return make


def lost(channels: Channels) -> list[int]:
    """How many channels each block has lost."""
    return [
        max(shape[1] - channels.shapes[i][name][1] for name, shape in block.items())
        for i, block in enumerate(channels.originals)
    ]


@FAMILIES
def test_a_plan_of_what_is_left_meets_the_budget_and_loses_less(
    family: str, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    b = bench(family)
    channels = b.choose(tmp_path / "channels")
    assert any(lost(channels))
    assert all(count % 4 == 0 for count in lost(channels))
    store = b.factors(tmp_path / "factors", channels)
    whole = factorize_model(b.model, b.curvature, tmp_path / "whole", sides="two", device=CPU)
    method = rankwise.Global(0.6, rank_multiple=1)
    plan, other = method.allocate(store, "fp32"), method.allocate(whole, "fp32")
    assert plan.ratio == pytest.approx(0.6, rel=1e-3)
    assert plan.ratio == plan.parameters / other.dense_parameters
    assert plan.loss is not None
    assert other.loss is not None
    assert plan.loss < other.loss
    narrow = {name for name, spec in plan if spec.dense_shape}
    assert {name for name, spec in plan if spec.out_features * spec.in_features < spec.dense_parameters} == narrow


def test_losses_are_those_of_the_metric(bench: Callable[..., Bench], tmp_path: Path) -> None:
    b = bench()
    channels = b.choose(tmp_path / "channels")
    for index, block in enumerate(block_linears(b.model)):
        c, f = b.curvature.metric(index)
        name = DOWN.format(index)
        if not (gone := lost(channels)[index]):
            assert name not in channels.losses
            continue
        weight, inputs = weight_of(block[name]), definite(c[name])
        kept = channels.rows(f"model.layers.{index}.mlp.up_proj")
        assert kept is not None
        assert len(kept) == 48 - gone
        new = channels.cut(name, weight)
        torch.testing.assert_close(new, without(weight, inputs, kept).float())
        error = weight.double().clone()
        error[:, kept] -= new.double()
        loss = float(((definite(f[name]) @ error) * (error @ inputs)).sum() / 2)
        assert channels.losses[name] == pytest.approx(loss, rel=1e-5)
        gate = f"model.layers.{index}.mlp.gate_proj"
        assert torch.equal(channels.cut(gate, weight_of(block[gate])), weight_of(block[gate])[kept])
        narrow_c, narrow_f = channels.restrict(name, c[name], f[name])
        assert torch.equal(narrow_c, c[name][kept][:, kept])
        assert narrow_f is f[name]


def test_a_smaller_budget_leaves_no_more(bench: Callable[..., Bench], tmp_path: Path) -> None:
    b = bench()
    counts = [lost(b.choose(tmp_path / str(ratio), ratio)) for ratio in (1.0, 0.9, 0.6, 0.3)]
    assert counts[0] == [0, 0]
    for first, then in pairwise(counts):
        assert all(more >= less for less, more in zip(first, then, strict=True))
    assert max(counts[-1]) == 24  # half of the channels stay


def test_layers_that_are_kept_keep_their_channels(bench: Callable[..., Bench], tmp_path: Path) -> None:
    channels = bench().choose(tmp_path / "channels", 0.6, keep=("model.layers.0.mlp.up_proj",))
    assert lost(channels)[0] == 0
    assert lost(channels)[1] > 0


@FAMILIES
def test_channels_go_only_where_they_save_enough(
    family: str, bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(family)
    monkeypatch.setattr(widths, "WORTH", 0.0)
    narrow = b.choose(tmp_path / "0")
    method = rankwise.Global(0.6, rank_multiple=1)
    stores = b.factors(tmp_path / "factors", narrow), b.factors(tmp_path / "whole", None)
    fewer, whole = (method.allocate(store, "fp32").loss for store in stores)
    assert fewer is not None
    assert whole is not None
    saved = 1 - fewer / whole
    assert saved > 0
    for share, found in ((0.7, lost(narrow)), (1.3, [0, 0])):
        monkeypatch.setattr(widths, "WORTH", share * saved)
        assert lost(b.choose(tmp_path / str(share))) == found


@pytest.mark.parametrize("kinds", [("dense", "lowrank"), ("lowrank",)], ids=["may stay dense", "must be factored"])
def test_a_layer_that_the_text_never_reached_does_not_hide_what_is_saved(
    kinds: tuple[str, ...], bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, unseen = bench(), "model.layers.0.self_attn.q_proj"
    metric = Curvature.metric

    def without(self: Curvature, index: int) -> Any:
        c, f = metric(self, index)
        return c, {name: matrix * (name != unseen) for name, matrix in f.items()}

    monkeypatch.setattr(Curvature, "metric", without)
    for worth, some in ((0.0, True), (0.01, True), (0.9, False)):
        monkeypatch.setattr(widths, "WORTH", worth)
        assert any(lost(b.choose(tmp_path / str(worth), kinds=kinds))) == some


def test_what_is_done_is_found_again(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    first = b.choose(tmp_path)
    files = {index: first.file(index).read_bytes() for index in range(2)}
    first.file(1).unlink()  # killed before the end
    measured: list[int] = []
    measure = Block.measure

    def noting(block: Block, *given: Any, **more: Any) -> None:
        measured.append(block.index)
        measure(block, *given, **more)

    monkeypatch.setattr(Block, "measure", noting)
    again = b.choose(tmp_path)
    assert {index: again.file(index).read_bytes() for index in range(2)} == files
    other = b.choose(tmp_path, 0.5)  # another budget, the same spectra
    assert other.folder != first.folder
    assert not measured
    b.choose(tmp_path, keep=("*.0.mlp.*",))
    assert measured == [0, 1]


def test_a_plan_can_say_how_many_stay(bench: Callable[..., Bench], tmp_path: Path) -> None:
    b = bench()
    channels = b.choose(tmp_path / "channels", planned={DOWN.format(1): 30})
    assert lost(channels) == [0, 18]
    with pytest.raises(RankwiseError, match=r"q_proj.in_features: 8; this layer keeps all"):
        b.choose(tmp_path / "other", planned={"model.layers.0.self_attn.q_proj": 8})


def test_what_the_text_never_reached_keeps_its_channels(bench: Callable[..., Bench], tmp_path: Path) -> None:
    b = bench()
    folder = b.curvature.folder

    class Blind(Curvature):
        def outputs(self, index: int) -> dict[str, torch.Tensor]:
            return {name: torch.zeros_like(f) if index else f for name, f in super().outputs(index).items()}

    blind = replace(b, curvature=Blind(folder, b.curvature.identity))
    channels = blind.choose(tmp_path / "channels", 0.8)
    assert lost(channels)[1] == 0
    assert all(math.isfinite(loss) for loss in channels.losses.values())


@FAMILIES
def test_compressed_the_model_does_what_the_plan_says(family: str, bench: Callable[..., Bench], tmp_path: Path) -> None:
    b = bench(family)
    channels = b.choose(tmp_path / "channels")
    store = b.factors(tmp_path / "factors", channels)
    plan = rankwise.Global(0.6, rank_multiple=1).allocate(store, "fp32")
    expected = {}
    for block in block_linears(b.model):
        for name, linear in block.items():
            spec, rows = plan.layers[name], channels.rows(name)
            weight = channels.cut(name, weight_of(linear))
            if spec.kind != "dense":
                u, v = store.load(name, spec.rank)
                weight = u @ v
            bias = linear.bias if linear.bias is None or rows is None else linear.bias[rows]
            expected[name] = weight.clone(), None if bias is None else bias.clone()
    small = rankwise.compress(b.model, plan, store)
    for name, (weight, bias) in expected.items():
        layer = small.get_submodule(name)
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(small(b.windows).logits).all()


def test_one_folder_serves_every_budget(tiny: Callable[..., Any], tmp_path: Path) -> None:
    windows = torch.randint(2, 512, (8, 32), generator=torch.Generator().manual_seed(5))
    plans = [
        rankwise.allocate(tiny("llama"), windows, method, work=tmp_path)
        for method in (
            rankwise.Global(0.6, rank_multiple=1),
            rankwise.Global(0.6, rank_multiple=1, channel_multiple=4),
            rankwise.Global(0.5, rank_multiple=1, channel_multiple=4),
        )
    ]
    assert [round(plan.ratio, 3) for plan in plans] == [0.6, 0.6, 0.5]
    assert [any(spec.dense_shape for _, spec in plan) for plan in plans] == [False, True, True]


def test_channels_alone_can_meet_a_budget(tiny: Callable[..., Any], tmp_path: Path) -> None:
    windows = torch.randint(2, 512, (8, 32), generator=torch.Generator().manual_seed(5))
    total = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    method = rankwise.Global(1 - 9 * 96 / total, kinds=("dense",), channel_multiple=1, tolerance=0.05)
    plan = rankwise.allocate(tiny("llama"), windows, method, work=tmp_path)
    assert {spec.kind for _, spec in plan} == {"dense"}
    assert method.ratio - 0.05 <= plan.ratio <= method.ratio
    method = rankwise.Global(0.1, kinds=("dense",), channel_multiple=1)
    with pytest.raises(RankwiseError, match=r"^ratio: 0.1; "):
        rankwise.allocate(tiny("llama"), windows, method, work=tmp_path)
