"""The refit: of use on text that it did not see, resumable, and the model is left as it was."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from rankwise.alloc import layout
from rankwise.alloc import refit as module
from rankwise.alloc.curvature import Curvature, collect
from rankwise.alloc.layout import Layout
from rankwise.alloc.methods import Global
from rankwise.alloc.moments import OCTAVES
from rankwise.alloc.refit import refit, swapped
from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.alloc.stream import BlockStream
from rankwise.anatomy import block_linears, features, weight_of
from rankwise.errors import RankwiseError
from rankwise.pipeline import compress
from rankwise.plan import LayerSpec, RankPlan

CPU = torch.device("cpu")
LENGTH = 32
ARCHITECTURES = pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
Files = dict[str, bytes]


@dataclass
class Bench:
    """A model, its factors, and text that it said itself: 24 windows to fit to, 8 that judge."""

    model: Any
    curvature: Curvature
    store: FactorStore
    windows: torch.Tensor
    held_out: torch.Tensor

    def plan(self, ratio: float = 0.5, **options: Any) -> RankPlan:
        return Global(ratio, **({"rank_multiple": 1} | options)).allocate(self.store, "fp32")

    def into(self, folder: Path, plan: RankPlan, **more: Any) -> Refitted:
        return Refitted(folder, self.store, {"layers": plan.to_dict()["layers"], **more})

    def refit(self, folder: Path, plan: RankPlan, **options: Any) -> Refitted:
        into, texts = self.into(folder, plan), {"windows": self.windows, "held_out": self.held_out}
        options = texts | {"device": CPU} | options
        return refit(self.model, plan, self.store, self.curvature, into=into, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    """Benches, each measured once; each call gives a copy of the model."""
    found: dict[Any, Bench] = {}

    def make(model: Any, say: Callable[..., torch.Tensor], sides: str, *key: Any) -> Bench:
        if (sides, *key) not in found:
            folder, windows = tmp_path_factory.mktemp("bench"), say(model, 32, LENGTH)
            weighting = windows[:24] if sides == "two" else None
            curvature = collect(model, windows[:24], weighting, folder / "curvature", device=CPU)
            store = factorize_model(model, curvature, folder / "factors", sides=sides, device=CPU)
            found[sides, *key] = Bench(model, curvature, store, windows[:24], windows[24:])
        return replace(found[sides, *key], model=copy.deepcopy(model))

    return make


@pytest.fixture
def bench(tiny: Callable[..., Any], spoken: Callable[..., torch.Tensor], made: Callable[..., Bench]) -> Any:
    """`bench("llama")`; `change` is done to the model first."""

    def make(
        family: str = "llama", sides: str = "two", *, change: Callable[[Any], Any] = lambda m: m, **options: Any
    ) -> Bench:
        model = change(tiny(family, **options))
        return made(model, spoken, sides, family, change.__name__, *options.values())

    return make


def state(model: Any) -> dict[str, Any]:
    """Every parameter's place, value and flag."""
    return {name: (p.data_ptr(), p.clone(), p.requires_grad) for name, p in model.named_parameters()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[n][0] == b[n][0] and torch.equal(a[n][1], b[n][1]) and a[n][2] == b[n][2] for n in a
    )


def contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@torch.no_grad()
def block_outputs(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """What every block puts out."""
    return list(model(input_ids=windows, output_hidden_states=True).hidden_states[1:])


def errors(small: Any, dense: list[torch.Tensor], windows: torch.Tensor) -> list[float]:
    """Relative squared error of every block's output."""
    pairs = zip(block_outputs(small, windows), dense, strict=True)
    return [float((a - b).square().sum() / b.square().sum()) for a, b in pairs]


@torch.no_grad()
def rmsnorm_input(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """What the first block's attention reads, `[d, N]`, of windows that are one token long."""
    block = model.model.layers[0]
    hidden: torch.Tensor = block.input_layernorm(model.model.embed_tokens(windows[:, 0]))
    return hidden.T


# --- of use -----------------------------------------------------------------------------------------------------------


@ARCHITECTURES
@pytest.mark.parametrize("kinds", [("dense", "lowrank", "pivot"), ("lowrank",)], ids=["all-kinds", "lowrank"])
def test_block_outputs_on_unseen_text_come_nearer(
    family: str,
    kinds: tuple[str, ...],
    bench: Callable[..., Bench],
    spoken: Callable[..., torch.Tensor],
    tmp_path: Path,
) -> None:
    b, ratio = bench(family), 0.5
    unseen = spoken(b.model, 16, LENGTH, seed=7)
    dense, plan = block_outputs(b.model, unseen), b.plan(ratio, kinds=kinds)
    found = b.refit(tmp_path / "refit", plan)
    after = errors(compress(b.model, plan, found), dense, unseen)
    model = bench(family).model
    before = errors(compress(model, plan, b.store), dense, unseen)
    assert after[-1] < 0.98 * before[-1]
    assert sum(outcome.share is not None for outcome in found.outcomes().values()) > len(plan.layers) / 3
    assert all(outcome.gain >= 0 for outcome in found.outcomes().values())
    assert list(found.outcomes()) == list(plan.layers)


def test_layers_that_write_to_the_stream_make_up_for_what_was_lost(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that the last block's output is further off."""
    b = bench("gpt2")
    plan, dense = b.plan(kinds=("dense", "lowrank")), block_outputs(b.model, b.held_out)
    with_partners = b.refit(tmp_path / "a", plan)
    monkeypatch.setattr(layout, "_partner", lambda *arguments: None)
    without = b.refit(tmp_path / "b", plan)
    found = {}
    for name, factors in (("with", with_partners), ("without", without)):
        found[name] = errors(compress(bench("gpt2").model, plan, factors), dense, b.held_out)[-1]
    assert found["with"] < 0.98 * found["without"]


def test_tokens_weigh_what_the_curvature_says(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If first tokens alone count, and of one layer alone, it fits them better, and its neighbours what they did."""
    b, heavy = bench(), "model.layers.0.self_attn.v_proj"
    plan = b.plan(kinds=("lowrank",))
    ones = {name: torch.ones(OCTAVES) for name in b.store.shapes}
    first = torch.zeros(OCTAVES)
    first[0] = 1

    def fit(folder: str, emphasis: dict[str, torch.Tensor]) -> Refitted:
        monkeypatch.setattr(Curvature, "emphasis", lambda self, index: emphasis)
        return b.refit(tmp_path / folder, plan, held_out=b.windows)

    plain, alike, special = fit("none", {}), fit("ones", ones), fit("first", ones | {heavy: first})
    x = rmsnorm_input(b.model, b.windows[:, :1])
    dense = weight_of(b.model.get_submodule(heavy))
    off = [float(((dense - found.weights(0)[heavy]) @ x).square().sum()) for found in (alike, special)]
    assert off[1] < 0.5 * off[0]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"):
        assert torch.equal(alike.weights(0)[name], special.weights(0)[name])
    for name, weight in plain.weights(0).items():
        assert torch.allclose(alike.weights(0)[name], weight, atol=1e-4)


def test_dense_layers_get_new_weights_where_they_help(bench: Callable[..., Bench], tmp_path: Path) -> None:
    b = bench()
    plan = b.plan(0.7, kinds=("dense", "lowrank"))
    dense = [name for name, spec in plan if spec.kind == "dense"]
    found = b.refit(tmp_path / "refit", plan)
    moved = [name for name in dense if found.outcomes()[name].share is not None]
    assert moved
    small = compress(bench().model, plan, found)
    for name in dense:
        weight, was = small.get_submodule(name).weight, weight_of(b.model.get_submodule(name))
        assert torch.equal(weight, was) == (name not in moved)
        assert torch.equal(weight, found.weight(name, was))
    assert all(found.weight(name, w) is w for name, spec in plan for w in (torch.empty(0),) if spec.kind != "dense")


def test_nothing_changes_where_nothing_was_lost(bench: Callable[..., Bench], tmp_path: Path) -> None:
    b = bench()
    plan = b.plan(1.0)
    assert plan.compressed == {}
    found = b.refit(tmp_path / "refit", plan)
    assert {outcome.share for outcome in found.outcomes().values()} == {None}
    assert found.weights(0) == found.weights(1) == {}


@ARCHITECTURES
def test_without_output_moments_the_metric_is_plain(
    family: str, bench: Callable[..., Bench], spoken: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    b = bench(family, "one")
    assert not b.curvature.has_outputs
    unseen = spoken(b.model, 8, LENGTH, seed=7)
    dense, plan = block_outputs(b.model, unseen), b.plan(sides="one")
    found = b.refit(tmp_path / "refit", plan)
    before = errors(compress(bench(family, "one").model, plan, b.store), dense, unseen)[-1]
    assert errors(compress(b.model, plan, found), dense, unseen)[-1] < 0.97 * before


def test_any_components_may_be_kept(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """A plan that keeps others than the first components: refitted to its rank, found again under its name."""
    b = bench()
    layers = {n: LayerSpec("lowrank", m, k, 4, "fp32", indices=(0, 2, 3, 9)) for n, (m, k) in b.store.shapes.items()}
    plan = RankPlan(layers)
    found = b.refit(tmp_path / "refit", plan)
    again = b.into(tmp_path / "refit", plan)
    for name, (m, n) in b.store.shapes.items():
        u, v = again.load(name, 4, (0, 2, 3, 9))
        assert (u.shape, v.shape) == ((m, 4), (4, n))
        if found.outcomes()[name].share is None:
            assert all(torch.equal(x, y) for x, y in zip((u, v), b.store.load(name, 4, (0, 2, 3, 9)), strict=True))
    assert any(outcome.gain > 0 for outcome in found.outcomes().values())
    compress(b.model, plan, found)


def add_layers(model: Any) -> Any:
    """One layer that is never used, and one that sees some tokens alone, as an expert does."""
    mlp = model.model.layers[1].mlp
    mlp.spare, mlp.routed = (nn.Linear(32, 32).requires_grad_(False) for _ in range(2))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return torch.cat([y[:, :9], y[:, 9:] + self.routed(x[:, 9:])], dim=1)

    mlp.forward = MethodType(forward, mlp)
    return model


def test_layers_that_not_every_token_reaches_keep_their_factors(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, used = bench(change=add_layers), []
    plan = b.plan(0.5, kinds=("lowrank",))

    def watched(block: dict[str, nn.Module], weights: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> Any:
        used.append("model.layers.0.mlp.up_proj" in block or "model.layers.1.mlp.routed" in weights)
        return swapped(block, weights, rows)

    monkeypatch.setattr(module, "swapped", watched)
    found = b.refit(tmp_path / "refit", plan)
    assert all(used)  # from the first, the compressed model's second block runs with the factors that stay
    for leaf in ("spare", "routed"):
        name = f"model.layers.1.mlp.{leaf}"
        rank = plan.layers[name].rank
        kept = b.store.load(name, rank)
        assert all(torch.equal(a, c) for a, c in zip(found.load(name, rank), kept, strict=True))
        assert found.outcomes()[name].share is None
        assert torch.equal(found.weights(1)[name], kept[0] @ kept[1])
    assert found.outcomes()["model.layers.1.mlp.up_proj"].gain > 0
    small = compress(b.model, plan, found)
    assert type(small.model.layers[1].mlp.spare).__name__ == "LowRankLinear"


def test_windows_that_do_not_reach_a_layer_are_passed_over(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grab, count = Layout.grab, 0

    def sometimes(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return None if count % 5 == 0 else grab(*arguments)

    b = bench()
    monkeypatch.setattr(Layout, "grab", sometimes)
    assert any(o.gain > 0 for o in b.refit(tmp_path / "some", b.plan()).outcomes().values())
    monkeypatch.setattr(Layout, "grab", lambda *arguments: None)
    assert {o.share for o in b.refit(tmp_path / "none", b.plan()).outcomes().values()} == {None}


# --- the model is left as it was --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@ARCHITECTURES
def test_the_model_is_left_as_it_was(
    family: str, dtype: torch.dtype, bench: Callable[..., Bench], dies: Any, tmp_path: Path
) -> None:
    b = bench(family, dtype=dtype)
    before = state(b.model)
    with pytest.raises(InterruptedError):
        b.refit(tmp_path / "refit", b.plan(), track=dies(1))
    assert same(before, state(b.model))
    b.refit(tmp_path / "refit", b.plan())
    assert same(before, state(b.model))


def test_an_error_in_the_middle_of_a_block_leaves_the_model_as_it_was(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, calls, closed = bench(), 0, []
    monkeypatch.setattr(BlockStream, "close", lambda stream: closed.append(stream))

    def fails(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls == 51:
            raise InterruptedError

    b.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fails)
    before = state(b.model)
    with pytest.raises(InterruptedError):
        b.refit(tmp_path / "refit", b.plan())
    assert same(before, state(b.model))
    assert len(closed) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_swapped_weights_are_used_and_put_back(family: str, tiny: Callable[..., Any]) -> None:
    block = block_linears(tiny(family))[0]
    name, layer = next(iter(block.items()))
    m, n = features(layer)
    kept, other = weight_of(layer).clone(), torch.randn(m, n)
    x = torch.randn(1, 3, n)
    bias = 0 if layer.bias is None else layer.bias

    def use_and_fail() -> None:
        with swapped(block, {name: other}):
            assert torch.equal(weight_of(layer), other)
            assert torch.allclose(layer(x) - bias, x @ other.T, atol=1e-4)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        use_and_fail()
    assert torch.equal(weight_of(layer), kept)


# --- resumable, and refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_killed_after_any_block_the_next_run_writes_the_same_bytes(
    at: int, family: str, bench: Callable[..., Bench], dies: Any, tmp_path: Path
) -> None:
    b = bench(family)
    plan = b.plan()
    b.refit(tmp_path / "whole", plan)
    with pytest.raises(InterruptedError):
        b.refit(tmp_path / "killed", plan, track=dies(at))
    done = contents(tmp_path / "killed")
    assert len(done) == 1 + at
    first = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in done}
    b.refit(tmp_path / "killed", plan)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert first == {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in done}  # not done again


@pytest.mark.parametrize("which", ["windows", "held_out"])
def test_a_refit_needs_windows(which: str, bench: Callable[..., Bench], tmp_path: Path) -> None:
    b = bench()
    with pytest.raises(RankwiseError, match=r"windows: 0; a refit needs at least 1"):
        b.refit(tmp_path / "refit", b.plan(), **{which: b.windows[:0]})


def test_numbers_out_of_range_name_the_layer(bench: Callable[..., Bench], tmp_path: Path) -> None:
    b = bench()
    b.model.model.layers[0].mlp.act_fn.forward = lambda x: x * float("inf")
    with pytest.raises(RankwiseError, match=r"^model.layers.0.mlp.down_proj: activations: NaN or Inf in the comp"):
        b.refit(tmp_path / "refit", b.plan())
