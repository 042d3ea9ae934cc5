"""A packed group equals its layers one by one, whatever their kinds, and the kernels for a few tokens equal fp64."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE, TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error, summed_in_order
from torch.fx.experimental.proxy_tensor import make_fx

from rankwise.errors import RankwiseError
from rankwise.kernels import Dense, LowRank, Pivot, lowrank_linear, pack, packed_linear, pivot_linear
from rankwise.kernels.backend import backend, capability
from rankwise.kernels.expand import TILE
from rankwise.kernels.members import Member
from rankwise.kernels.pack import table_of
from rankwise.kernels.packed import packed, run, splits_for
from rankwise.kernels.shrink import shares

N = 300  # more than one split of the reduction, and no multiple of anything


def member(kind: str, outputs: int, rank: int, dtype: torch.dtype, inputs: int = N, seed: int = 0) -> Member:
    """A random layer; small numbers, so that half precision holds the sums."""
    scale = inputs**-0.5
    first = draw(outputs if kind == "dense" else rank, inputs, seed=seed) * scale
    if kind == "dense":
        return Dense(first.to(dtype))
    if kind == "lowrank":
        return LowRank(first.to(dtype), draw(outputs, rank, dtype=dtype, seed=seed + 1))
    index = torch.randperm(outputs, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.int32)
    return Pivot(index, first.to(dtype), draw(outputs - rank, rank, dtype=dtype, seed=seed + 1))


def alone(x: torch.Tensor, layer: Member) -> torch.Tensor:
    """One layer in fp64, by the functions for single layers."""
    x = x.double()
    with backend("torch"):
        if isinstance(layer, Dense):
            return x @ layer.weight.double().T
        if isinstance(layer, LowRank):
            return lowrank_linear(x, layer.v.double(), layer.u.double())
        return pivot_linear(x, layer.index, layer.basis.double(), layer.coeff.double())


def mixed(dtype: torch.dtype) -> list[Member]:
    """One of each kind, and sizes that fill no tile."""
    return [
        member("dense", 50, 0, dtype),
        member("lowrank", 70, 24, dtype, seed=3),
        member("pivot", 40, 16, dtype, seed=5),
    ]


def biases(members: Sequence[Member], dtype: torch.dtype) -> list[torch.Tensor | None]:
    """For all but the first."""
    return [None, *(draw(m.outputs, dtype=dtype, seed=11) for m in members[1:])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_pytorch_runs_a_group_as_its_layers(dtype: torch.dtype, tokens: int) -> None:
    members, x = mixed(dtype), draw(tokens, N, dtype=dtype)
    given_biases = biases(members, dtype)
    y = packed_linear(x, pack(members, given_biases), draw(tokens, 160, dtype=dtype))
    parts = [alone(x, m) + (0 if b is None else b.double()) for m, b in zip(members, given_biases, strict=True)]
    assert y.dtype == dtype
    exact = torch.cat(parts, -1) + draw(tokens, 160, dtype=dtype).double()
    assert relative_error(y, exact) <= TOLERANCE[dtype] if tokens else y.shape == (0, 160)


@needs_triton
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "norm, bias, residual"])
def test_triton_runs_every_kind_at_once(tokens: int, dtype: torch.dtype, extras: bool) -> None:
    members, x = mixed(dtype), draw(tokens, N, dtype=dtype)
    group = pack(members, biases(members, dtype) if extras else None)
    residual, eps = (draw(tokens, 160, dtype=dtype, seed=4), 1e-5) if extras else (None, None)
    with in_triton():
        y = packed_linear(x, group, residual, eps=eps)
    normed = torch.nn.functional.rms_norm(x.double(), (N,), eps=eps) if extras else x
    exact = torch.cat([alone(normed, m) for m in members], -1)
    if extras:
        exact += torch.cat([torch.zeros(50, device=DEVICE), *(b for b in biases(members, dtype)[1:] if b is not None)])
        exact += residual.double()
    assert y.dtype == dtype
    assert relative_error(y, exact) <= TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kinds", [("lowrank", "lowrank"), ("dense", "dense"), ("lowrank", "dense")], ids="+".join)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_gate_and_up(tokens: int, kinds: tuple[str, str], dtype: torch.dtype) -> None:
    members = [member(kind, 70, 24, dtype, seed=i) for i, kind in enumerate(kinds)]
    x, residual = draw(tokens, N, dtype=dtype), draw(tokens, 70, dtype=dtype)
    bias = [draw(70, dtype=dtype), None]
    with in_triton():
        y = packed_linear(x, pack(members, bias), residual, swiglu=True)
    gate = alone(x, members[0]) + bias[0].double()
    exact = torch.nn.functional.silu(gate) * alone(x, members[1]) + residual.double()
    assert y.dtype == dtype
    assert relative_error(y, exact) < TOLERANCE[dtype]


@needs_triton
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_groups_of_any_shape(data: st.DataObject) -> None:
    inputs, tokens = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 20))
    members = []
    for seed in range(data.draw(st.integers(1, 3))):
        outputs = data.draw(st.integers(1, 80))
        kind = data.draw(st.sampled_from(["dense", "lowrank", "pivot"]))
        members.append(member(kind, outputs, data.draw(st.integers(1, outputs)), torch.float32, inputs, seed))
    x = draw(tokens, inputs, dtype=torch.float32)
    with in_triton():
        y = packed_linear(x, pack(members))
    assert relative_error(y, torch.cat([alone(x, m) for m in members], -1)) < 1e-5


@needs_triton
def test_packed_is_what_the_layers_are_alone_to_the_bit() -> None:
    members, x = mixed(torch.float32), draw(2, N, dtype=torch.float32)
    with in_triton(), summed_in_order():
        y = packed_linear(x, pack(members))
        single = torch.cat([packed_linear(x, pack([m])) for m in members], -1)
    assert torch.equal(y, single)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 8), st.sampled_from([64, 128, 512]))
def test_every_split_has_something_to_do(inner: int, wanted: int, step: int) -> None:
    splits, chunk = shares(inner, wanted, step)
    assert 1 <= splits <= wanted
    assert (splits - 1) * chunk < inner <= splits * chunk
    assert chunk % step == 0


def test_splits_of_one_size_go_without_a_remainder() -> None:
    """5 splits of 4,096 columns would be of 1,024, and the fifth would have none."""
    assert splits_for(1, 4096, 1024, 16, 132) == 5
    assert shares(4096, 5, 512) == (4, 1024)


@needs_triton
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_number_of_splits_changes_rounding_alone(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, group = draw(tokens, 2048, dtype=torch.float32), pack([member("lowrank", 40, 24, torch.float32, 2048)])
    outcomes = []
    for splits in (1, 2, 3, 5, 8):
        monkeypatch.setattr("rankwise.kernels.packed.splits_for", lambda *_, n=splits: n)
        with in_triton():
            outcomes.append(packed_linear(x, group))
    assert all(relative_error(y, outcomes[0]) < 1e-6 for y in outcomes)


@needs_triton
@pytest.mark.parametrize("tokens", [1, 7])
def test_whole_numbers_are_exact_and_calls_repeat(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    v, u, x = (
        torch.randint(-3, 4, size, generator=generator).float().to(DEVICE)
        for size in ((24, 1000), (40, 24), (tokens, 1000))
    )
    with in_triton():
        first, second = (lowrank_linear(x, v, u) for _ in range(2))
    assert torch.equal(first, x @ v.T @ u.T)
    assert torch.equal(second, first)


@needs_triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_one_hot_inputs_read_columns(tokens: int, dtype: torch.dtype) -> None:
    """Of every kind of member; numbers whose sums are exact."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(DEVICE, dtype)

    w, v, u, b, c = whole(50, N), whole(24, N), whole(70, 24), whole(16, N), whole(24, 16)
    index = torch.randperm(40, generator=generator).to(DEVICE, torch.int32)
    pivot = torch.cat([b.double(), c.double() @ b.double()])[index.long()]
    weight = torch.cat([w.double(), u.double() @ v.double(), pivot])
    columns = torch.arange(tokens, device=DEVICE) * 70 + 3
    with in_triton():
        y = packed_linear(
            torch.eye(N, dtype=dtype, device=DEVICE)[columns], pack([Dense(w), LowRank(v, u), Pivot(index, b, c)])
        )
    assert torch.equal(y.double(), weight.T[columns])


@needs_triton
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dense", [48, 50, 54])
def test_components_begin_anywhere_behind_a_dense_layer(dense: int, tokens: int) -> None:
    """At a multiple of 8 or not, whatever the number of all components is."""
    generator = torch.Generator().manual_seed(dense)
    w, v, u, x = (
        torch.randint(-3, 4, size, generator=generator).float().to(DEVICE)
        for size in ((dense, 600), (24, 600), (40, 24), (tokens, 600))
    )
    with in_triton():
        y = packed_linear(x, pack([Dense(w), LowRank(v, u), Dense(w[:6]), LowRank(v, u)]))
    exact = [x @ w.T, x @ v.T @ u.T, x @ w[:6].T, x @ v.T @ u.T]
    assert torch.equal(y, torch.cat(exact, -1))


@needs_triton
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_single_layers_take_the_same_kernels(rank: int) -> None:
    low, pivot = member("lowrank", 40, rank, torch.float32), member("pivot", 41, rank, torch.float32)
    x, bias = draw(2, 3, N, dtype=torch.float32), draw(41, dtype=torch.float32)
    assert isinstance(low, LowRank)
    assert isinstance(pivot, Pivot)
    strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    with in_triton():
        y = lowrank_linear(x, low.v, low.u, bias[:40])
        z = pivot_linear(strided, pivot.index, pivot.basis, pivot.coeff, bias.repeat_interleave(2)[::2])
    assert relative_error(y, alone(x, low) + bias[:40].double()) < 1e-5
    assert relative_error(z, alone(x, pivot) + bias.double()) < 1e-5


def test_whoever_wants_a_gradient_gets_the_librarys_products() -> None:
    low = member("lowrank", 40, 8, torch.float32)
    assert isinstance(low, LowRank)
    x = draw(2, N, dtype=torch.float32).requires_grad_()
    with backend("triton") if DEVICE == "cuda" else backend("auto"):
        lowrank_linear(x, low.v, low.u).sum().backward()
    assert relative_error(x.grad, (low.u.double() @ low.v.double()).sum(0).expand(2, N)) < 1e-5


def test_a_group_wants_one_input_and_a_gate_its_like() -> None:
    with pytest.raises(RankwiseError, match="members"):
        pack([member("dense", 8, 0, torch.float32), member("dense", 8, 0, torch.float32, inputs=7)])
    pivots = pack([member("pivot", 8, 4, torch.float32), member("pivot", 8, 4, torch.float32)])
    with pytest.raises(RankwiseError, match="swiglu"):
        packed_linear(draw(1, N, dtype=torch.float32), pivots, swiglu=True)


def test_the_table_covers_every_output_once() -> None:
    shapes = ((70, 24, 70), (40, 16, 24), (33, 33, 0))
    rows = table_of(shapes, torch.device("cpu")).tolist()
    covered = sorted(start + i for *_, count, start in rows for i in range(count))
    assert covered == list(range(143))
    assert max(count for *_, count, _ in rows) <= TILE


@needs_triton
def test_a_compiler_sees_one_node() -> None:
    group, x = pack(mixed(torch.float32)), draw(2, N, dtype=torch.float32)
    tensors = group.first, group.second, group.table, group.place

    def call(x: torch.Tensor, first: Any, second: Any, table: Any, place: Any) -> torch.Tensor:
        return packed_linear(x, replace(group, first=first, second=second, table=table, place=place))

    with in_triton():
        graph = make_fx(call, tracing_mode="fake")(x, *tensors).graph
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(packed, (x, *tensors, None, None, 160, group.align, False, None), test_utils=checks)
    assert [node.target for node in graph.nodes if "rankwise" in str(node.target)] == [
        torch.ops.rankwise.packed.default
    ]


@needs_triton
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_folded_norm_holds_in_half_precision(tokens: int) -> None:
    """What the first factors make of large inputs is beyond fp16, what they make of normed ones is not."""
    low = member("lowrank", 40, 16, torch.float16)
    x = draw(tokens, N, dtype=torch.float16) * 3000
    with in_triton():
        y = packed_linear(x, pack([low]), eps=1e-6)
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert relative_error(y, alone(normed, low)) < TOLERANCE[torch.float16]


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are captured on a GPU alone")
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_captured_graph_gives_the_same_at_every_replay(tokens: int) -> None:
    """The counters of programs that share a reduction are zero again after each."""
    layer = member("lowrank", 512, 64, torch.bfloat16, 4096)
    assert isinstance(layer, LowRank)
    group, x = pack([layer]), draw(tokens, 4096, dtype=torch.bfloat16)
    assert splits_for(tokens, 4096, 64, 32, 132) > 1
    expected = packed_linear(x, group)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed_linear(x, group)
    for sign in (1, -1, 1):
        x.copy_(draw(tokens, 4096, dtype=torch.bfloat16) * sign)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected * sign)
    assert relative_error(y, alone(x, layer)) < TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(capability(torch.device(DEVICE)) < 90, reason="needs compute capability 9.0")
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_a_dependent_launch_waits_for_what_it_reads(tokens: int) -> None:
    """Many times in a row, as a race need not show at once."""
    group = pack([member("lowrank", 4096, 1024, torch.bfloat16, inputs=4096)])
    tensors = (group.first, group.second, group.table, None, None, None)
    inputs = [draw(tokens, 4096, dtype=torch.bfloat16, seed=seed) for seed in range(20)]
    expected = [run(x, *tensors, 4096, group.align, False, None, pdl=False) for x in inputs]
    found = [run(x * 1, *tensors, 4096, group.align, False, None, pdl=True) for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_triton
def test_tracing_leaves_nothing_behind() -> None:
    """Tensors of a tracer must not be kept for the calls that follow."""
    low = member("lowrank", 44, 12, torch.float32)
    assert isinstance(low, LowRank)
    x = draw(3, N, dtype=torch.float32)
    with backend("triton"):
        make_fx(lambda *given: lowrank_linear(*given), tracing_mode="fake")(x, low.v, low.u)
        y = lowrank_linear(x, low.v, low.u)
    assert type(y) is torch.Tensor
    assert relative_error(y, alone(x, low)) < 1e-5


@needs_triton
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_group_compiles_into_one_graph(swiglu: bool) -> None:
    group = pack([member("lowrank", 40, 16, torch.float32), member("lowrank", 40, 24, torch.float32, seed=2)])
    x = draw(2, N, dtype=torch.float32)
    with backend("triton"):
        compiled = torch.compile(lambda x: packed_linear(x, group, swiglu=swiglu), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), packed_linear(x, group, swiglu=swiglu))


@needs_triton
def test_operators_are_sound_for_tracers() -> None:
    group, x = pack(mixed(torch.float32)), draw(3, N, dtype=torch.float32)
    tensors = x, group.first, group.second, group.table, group.place, None, None
    low = member("lowrank", 40, 16, torch.float32)
    assert isinstance(low, LowRank)
    with backend("triton"):
        checks = ("test_schema", "test_faketensor")
        whole = (*tensors, sum(group.outputs), group.align, False, None)
        torch.library.opcheck(torch.ops.rankwise.packed.default, whole, test_utils=checks)
        one = (x, low.v, low.u, None, None, 40)
        torch.library.opcheck(torch.ops.rankwise.alone.default, one, test_utils=checks)


@needs_triton
def test_a_bias_that_wants_a_gradient_gets_one() -> None:
    low, bias = member("lowrank", 40, 16, torch.float32), torch.zeros(40, device=DEVICE, requires_grad=True)
    assert isinstance(low, LowRank)
    with backend("triton"):
        lowrank_linear(draw(2, N, dtype=torch.float32), low.v, low.u, bias).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((40,), 2.0, device=DEVICE))


def test_a_factor_of_rank_0_is_refused() -> None:
    with pytest.raises(RankwiseError, match="rank 0"):
        pack([LowRank(draw(0, N), draw(40, 0))])
