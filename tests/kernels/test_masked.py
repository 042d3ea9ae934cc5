"""The masked layer equals its formula, its gradients are true, and a hard mask is the truncated layer itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE, TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error

from rankwise.errors import RankwiseError
from rankwise.kernels import lowrank_linear, mask_probe, masked_matmul
from rankwise.kernels.backend import backend
from rankwise.kernels.gemm import Epilogue, column_sums, product
from rankwise.kernels.precision import full_precision, tf32_allowed

M, N, K = 12, 9, 6
LEADING = [pytest.param(shape, id="x".join(map(str, (*shape, N)))) for shape in [(), (5,), (2, 3), (0,), (2, 1, 3)]]


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_equals_the_dense_product(dtype: torch.dtype, leading: tuple[int, ...], with_bias: bool) -> None:
    x, u, v = draw(*leading, N, dtype=dtype), draw(M, K, dtype=dtype), draw(K, N, dtype=dtype)
    m, bias = draw(K).sigmoid().float(), draw(M, dtype=dtype) if with_bias else None
    y = masked_matmul(x, v, m, u, bias)
    expected = x.double() @ (u.double() @ torch.diag(m.double()) @ v.double()).T + (0 if bias is None else bias)
    assert (y.dtype, y.shape) == (dtype, (*leading, M))
    assert relative_error(y, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("frozen", [(), ("u", "v"), ("x",), ("m",)], ids=lambda names: "+".join(names) or "all")
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_gradients_are_those_of_finite_differences(frozen: tuple[str, ...], with_bias: bool) -> None:
    tensors = {"x": draw(2, 3, N), "v": draw(K, N), "m": draw(K), "u": draw(M, K)}
    if with_bias:
        tensors["bias"] = draw(M)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name not in frozen)
    assert torch.autograd.gradcheck(lambda *values: masked_matmul(*values), tuple(tensors.values()))


def test_the_gradient_of_a_frozen_tensor_is_not_worked_out() -> None:
    x, v, m, u = draw(3, N).requires_grad_(), draw(K, N), draw(K).requires_grad_(), draw(M, K)
    masked_matmul(x, v, m, u).sum().backward()
    assert v.grad is None
    assert u.grad is None
    assert x.grad is not None
    assert m.grad is not None


def test_x_is_not_kept_for_a_mask_alone() -> None:
    saved: list[torch.Size] = []
    x, v, m, u = draw(50, N).requires_grad_(), draw(K, N), draw(K).requires_grad_(), draw(M, K)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        masked_matmul(x, v, m, u)
    assert (50, K) in saved
    assert (50, N) not in saved


@pytest.mark.parametrize("keep", [0, 1, 4, K, torch.tensor([0, 2, 3]), torch.arange(K), torch.tensor([], dtype=int)])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_promised_mask_has_the_gradients_of_the_mask_itself(keep: int | torch.Tensor, trained: bool) -> None:
    hard = torch.zeros(K, dtype=torch.float64, device=DEVICE)
    hard[slice(keep) if isinstance(keep, int) else keep] = 1
    grads = []
    for promise in (None, keep):
        tensors = draw(2, 3, N), draw(K, N), hard.clone(), draw(M, K), draw(M)
        for tensor in tensors[:: 1 if trained else 2]:
            tensor.requires_grad_()
        y = masked_matmul(*tensors, promise)
        (y * draw(2, 3, M)).sum().backward()
        grads.append([y.detach(), *(tensor.grad for tensor in tensors)])
    for plain, promised in zip(*grads, strict=True):
        assert (plain is None) == (promised is None)
        if plain is not None:
            torch.testing.assert_close(promised, plain)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.data(),
)
def test_a_hard_mask_is_the_truncated_layer_to_the_bit(
    m_out: int, n: int, tokens: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, min(m_out, n)))
    rank = data.draw(st.integers(1, size))
    some = torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size))))
    x, v, u = draw(1, tokens, n, dtype=dtype), draw(size, n, dtype=dtype), draw(m_out, size, dtype=dtype)
    mask, bias = torch.zeros(size, device=DEVICE, requires_grad=True), draw(m_out, dtype=dtype)
    for keep, kept in ((rank, torch.arange(rank)), (some, some)):
        stored = v[kept].clone(), u[:, kept].clone(memory_format=torch.contiguous_format)
        with backend("torch"):
            assert torch.equal(masked_matmul(x, v, mask, u, bias, keep), lowrank_linear(x, *stored, bias))
            assert torch.equal(masked_matmul(x, v, mask.detach(), u, None, keep), lowrank_linear(x, *stored))


def test_the_masks_gradient_is_summed_in_fp32() -> None:
    """4,096 tokens that each add 1: bf16 would stop at 256."""
    x, one = (torch.ones(size, 1, dtype=torch.bfloat16, device=DEVICE) for size in (4096, 1))
    m = torch.ones(1, device=DEVICE, requires_grad=True)
    masked_matmul(x, one, m, one).sum().backward()
    assert m.grad is not None
    assert m.grad.dtype == torch.float32
    assert float(m.grad) == 4096


def test_the_probe_changes_nothing_and_tells_the_mask_what_components_are_worth() -> None:
    x, v, u, weights = draw(2, 3, N).requires_grad_(), draw(K, N), draw(M, K), draw(2, 3, M)
    m, dense = torch.ones(K, dtype=torch.float64, device=DEVICE, requires_grad=True), u @ v
    y = x @ dense.T
    probed = mask_probe(y, x, v, m, u)
    assert torch.equal(probed, y)
    (probed * weights).sum().backward()
    again = m.detach().clone().requires_grad_()
    (masked_matmul(x.detach(), v, again, u) * weights).sum().backward()
    torch.testing.assert_close(m.grad, again.grad)
    torch.testing.assert_close(x.grad, weights @ dense)  # that of the dense layer, once


def test_inputs_stay_as_they_are() -> None:
    tensors = [draw(3, N), draw(K, N), draw(K), draw(M, K), draw(M)]
    copies = [tensor.clone() for tensor in tensors]
    masked_matmul(*tensors)
    masked_matmul(*tensors, 3)
    masked_matmul(*tensors, torch.tensor([1, 4]))
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def everything(
    x: torch.Tensor, *others: torch.Tensor | None, keep: int | torch.Tensor | None = None
) -> list[torch.Tensor]:
    """y and the gradients of all tensors."""
    leaves = [x, *(tensor for tensor in others if tensor is not None)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = masked_matmul(*leaves, *([None] * (5 - len(leaves))), keep)
    (y * draw(*y.shape, dtype=y.dtype, seed=9)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def tensors(t: int, n: int, k: int, m: int, dtype: torch.dtype, *, bias: bool) -> list[torch.Tensor]:
    """x, V, m, U and perhaps a bias."""
    mask = draw(k, dtype=torch.float32, seed=3).sigmoid()
    made = [draw(t, n, dtype=dtype), draw(k, n, dtype=dtype, seed=1), mask, draw(m, k, dtype=dtype, seed=2)]
    return [*made, draw(m, dtype=dtype)] if bias else made


SIZES = [(5, 9, 6, 12), (130, 70, 40, 33), (1, 64, 64, 64), (70, 16, 1, 16), (65, 48, 272, 32), (0, 16, 4, 8)]


@needs_triton
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_triton_computes_what_fp64_does(sizes: tuple[int, ...], dtype: torch.dtype, with_bias: bool) -> None:
    made = tensors(*sizes, dtype, bias=with_bias)
    exact = everything(*(tensor.double() for tensor in made))
    with in_triton():
        found = everything(*made)
    for ours, wanted in zip(found, exact, strict=True):
        assert relative_error(ours, wanted) <= TOLERANCE[dtype] if wanted.numel() else ours.shape == wanted.shape


@needs_triton
@pytest.mark.parametrize("rank", [0, 1, 17, 64, 130])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_a_prefix_on_the_device_is_the_truncated_layer(rank: int, dtype: torch.dtype) -> None:
    x, v, mask, u = tensors(20, 48, 130, 32, dtype, bias=False)
    keep = torch.tensor(rank, dtype=torch.int32, device=DEVICE)
    y, dx, dv, dm, du = everything(*(t.double() for t in (x, v[:rank], mask[:rank], u[:, :rank])))
    past = [torch.zeros(size, device=DEVICE) for size in ((130 - rank, 48), (130 - rank,), (32, 130 - rank))]
    wanted = [y, dx, torch.cat([dv, past[0]]), torch.cat([dm, past[1]]), torch.cat([du, past[2]], 1)]
    with in_triton():
        found = everything(x, v, mask, u, keep=keep)
    for ours, exact in zip(found, wanted, strict=True):
        assert relative_error(ours, exact) <= TOLERANCE[dtype] if exact.any() else not ours.any()
    assert not any(
        ours.narrow(dim, rank, 130 - rank).any() for ours, dim in ((found[2], 0), (found[3], 0), (found[4], 1))
    )


def test_a_prefix_on_the_device_means_the_same_in_pytorch() -> None:
    made = tensors(20, 48, 30, 32, torch.float64, bias=False)
    keep = torch.tensor(11, dtype=torch.int32, device=DEVICE)
    hard = made[2].where(torch.arange(30, device=DEVICE) < 11, 0)
    assert torch.equal(masked_matmul(*made, None, keep), masked_matmul(made[0], made[1], hard, made[3]))


@needs_triton
def test_whole_numbers_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float().to(DEVICE)

    x, v, m, u, g = whole(9, 40), whole(20, 40), whole(20), whole(30, 20), whole(9, 30)
    with in_triton():
        leaves = [t.clone().requires_grad_() for t in (x, v, m, u)]
        y = masked_matmul(*leaves)
        y.backward(g)
    h, dz = x @ v.T, g @ u
    exact = [(dz * m) @ v, (dz * m).T @ x, (h * dz).sum(0), g.T @ (h * m)]
    assert torch.equal(y, (h * m) @ u.T)
    assert all(torch.equal(leaf.grad, wanted) for leaf, wanted in zip(leaves, exact, strict=True))


@needs_triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_a_mask_of_ones_is_the_dense_chain(dtype: torch.dtype) -> None:
    x, v, mask, u = tensors(33, 48, 20, 30, dtype, bias=False)
    with in_triton():
        y, dx, dv, _, du = everything(x, v, torch.ones_like(mask), u)
    leaves = [t.double().requires_grad_() for t in (x, v, u)]
    exact = leaves[0] @ leaves[1].T @ leaves[2].T
    (exact * draw(33, 30, dtype=dtype, seed=9).double()).sum().backward()
    for ours, wanted in zip((y, dx, dv, du), (exact.detach(), *(leaf.grad for leaf in leaves)), strict=True):
        assert relative_error(ours, wanted) <= TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("keep", [0, 1, 17, torch.tensor([0, 2, 9, 15]), torch.tensor([], dtype=int)])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_a_promised_mask_where_kernels_sum_its_gradient(dtype: torch.dtype, keep: int | torch.Tensor) -> None:
    """The library does the products, `column_sums` the mask's gradient."""
    x, v, _, u = tensors(14, 30, 20, 24, dtype, bias=False)
    hard = torch.zeros(20, device=DEVICE)
    hard[slice(keep) if isinstance(keep, int) else keep] = 1
    wanted = everything(*(t.double() for t in (x, v, hard, u)))
    with in_triton():
        found = everything(x, v, hard, u, keep=keep)
    for ours, exact in zip(found, wanted, strict=True):
        assert relative_error(ours, exact) <= TOLERANCE[dtype] if exact.any() else not ours.any()


@needs_triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_a_transposed_input_and_a_slice_of_factors(dtype: torch.dtype) -> None:
    x, v, mask, u = tensors(24, 40, 30, 32, dtype, bias=False)
    strided = x.T.contiguous().T, torch.cat([v, v], 1)[:, :40], mask, torch.cat([u, u], 1)[:, :30]
    with in_triton():
        found = everything(*strided)
    for ours, wanted in zip(found, everything(*(t.double() for t in (x, v, mask, u))), strict=True):
        assert relative_error(ours, wanted) <= TOLERANCE[dtype]


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are captured on a GPU alone")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_captured_graph_learns_the_rank_when_it_is_replayed(dtype: torch.dtype) -> None:
    x, v, mask, u = tensors(40, 64, 128, 48, dtype, bias=False)
    rank = torch.tensor(17, dtype=torch.int32, device=DEVICE)
    masked_matmul(x, v, mask, u, None, rank)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masked_matmul(x, v, mask, u, None, rank)
    for kept in (17, 100, 0, 128):
        rank.fill_(kept)
        graph.replay()
        exact = (x.double() @ v[:kept].double().T * mask[:kept].double()) @ u[:, :kept].double().T
        assert relative_error(y, exact) <= TOLERANCE[dtype] if kept else not y.any()


@needs_triton
def test_results_repeat_to_the_bit() -> None:
    made = tensors(300, 40, 24, 32, TRITON_DTYPES[-1], bias=True)
    with in_triton():
        first, second = everything(*made), everything(*made)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 300), st.integers(1, 130))
def test_column_sums_are_those_of_fp64(rows: int, columns: int) -> None:
    a, b = draw(rows, columns, dtype=torch.float16), draw(rows, columns, dtype=torch.float16, seed=1)
    with in_triton():
        assert relative_error(column_sums(a, b), (a.double() * b.double()).sum(0)) < 1e-5


@needs_triton
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 140), st.integers(1, 140), st.integers(1, 140), st.booleans(), st.booleans())
def test_a_product_and_its_epilogues(rows: int, inner: int, columns: int, across: bool, biased: bool) -> None:
    a, other = draw(rows, inner, dtype=torch.float32), draw(rows, columns, dtype=torch.float32, seed=2)
    b = draw(columns, inner, dtype=torch.float32, seed=1).T if across else draw(inner, columns, dtype=torch.float32)
    mask, bias = draw(columns, dtype=torch.float32), draw(columns, dtype=torch.float32, seed=4) if biased else None
    with in_triton():
        plain, masked, sums = product(a, b, Epilogue(mask=mask, other=other, bias=bias))
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    assert plain is not None
    assert masked is not None
    assert sums is not None
    assert relative_error(plain, exact) < 1e-5
    assert relative_error(masked, exact * mask.double()) < 1e-5
    assert relative_error(sums, (exact * other.double()).sum(0)) < 1e-4


# --- what memory behind a rank, strides and tracers may bring ---------------------------------------------------------


def layer(dtype: torch.dtype = torch.float32, n: int = 48, k: int = 64, m: int = 32) -> tuple[torch.Tensor, ...]:
    """x, V, mask and U, with sums of size 1."""
    x, v, u = draw(5, n, dtype=dtype), draw(k, n) / n**0.5, draw(m, k) / k**0.5
    return x, v.to(dtype), draw(k).sigmoid().float(), u.to(dtype)


@needs_triton
def test_backward_reads_nothing_that_forward_left_unwritten() -> None:
    """Where 16 does not divide n, the forward pass has narrower tiles than the backward pass."""
    x, v, m, u = (t.requires_grad_() for t in layer(torch.float16, n=40, k=128, m=64))
    x = draw(130, 40, dtype=torch.float16).requires_grad_()
    rank = torch.tensor(17, dtype=torch.int32, device=DEVICE)
    with in_triton():
        masked_matmul(x, v, m, u, None, rank).sum().backward()
    for tensor in (x, v, m, u):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
    assert m.grad is not None
    assert not m.grad[17:].any()


@needs_triton
@pytest.mark.parametrize("where", ["m", "u", "v"])
def test_numbers_behind_the_rank_do_not_matter(where: str) -> None:
    x, v, m, u = layer()
    rank = torch.tensor(17, dtype=torch.int32, device=DEVICE)
    expected = masked_matmul(x, v[:17], m[:17], u[:, :17].contiguous())
    {"m": m, "u": u.T, "v": v}[where][20] = torch.nan if where == "m" else 1e30  # factors are finite
    with in_triton():
        y = masked_matmul(x, v, m, u, None, rank)
    assert relative_error(y, expected) < 1e-5


@needs_triton
@pytest.mark.parametrize("how", ["strided", "expanded"])
def test_a_bias_may_have_any_stride(how: str) -> None:
    x, v, m, u = layer()
    bias = draw(64, dtype=torch.float32)[::2] if how == "strided" else draw(1, dtype=torch.float32).expand(32)
    with in_triton():
        y = masked_matmul(x, v, m, u, bias)
    assert relative_error(y, masked_matmul(x, v, m, u) + bias) < 1e-5


@needs_triton
@pytest.mark.parametrize("trained", ["m", "m v u x"])
def test_the_operator_is_sound_for_tracers(trained: str) -> None:
    """Schema, fake tensors, autograd registration, and AOT dispatch, by PyTorch's own check."""
    tensors = dict(zip("xvmu", layer(), strict=True))
    for name in trained.split():
        tensors[name].requires_grad_()
    arguments = (*tensors.values(), None, torch.tensor(17, dtype=torch.int32, device=DEVICE))
    with backend("triton"):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.rankwise.masked_forward.default, arguments, test_utils=checks)


@needs_triton
def test_it_compiles_into_one_graph_with_its_gradient() -> None:
    x, v, m, u = layer()
    m.requires_grad_()

    def loss(m: torch.Tensor) -> torch.Tensor:
        return masked_matmul(x, v, m, u).square().sum()

    with backend("triton"):
        whole = torch.compile(loss, backend="aot_eager", fullgraph=True)(m)
        (compiled,) = torch.autograd.grad(whole, m)
        (eager,) = torch.autograd.grad(loss(m), m)
    assert relative_error(compiled, eager) < 1e-6


@needs_triton
@pytest.mark.parametrize("how", ["probe", "prefix", "index"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_what_the_library_multiplies_compiles_into_one_graph_too(how: str, kernels: str) -> None:
    """`mask_probe`, and promised masks, whose products are the library's."""
    x, v, _, u = layer()
    y, keep = draw(5, 32, dtype=torch.float32), 17 if how == "prefix" else torch.arange(3, 40, 4, device=DEVICE)
    m = torch.zeros(64, device=DEVICE)
    m[slice(keep) if isinstance(keep, int) else keep] = 1
    m.requires_grad_()

    def loss(m: torch.Tensor) -> torch.Tensor:
        out = mask_probe(y, x, v, m, u) if how == "probe" else masked_matmul(x, v, m, u, None, keep)
        return (out * y).sum() + out.square().sum()

    with backend(kernels):
        whole = torch.compile(loss, backend="aot_eager", fullgraph=True)(m)
        (compiled,) = torch.autograd.grad(whole, m)
        (eager,) = torch.autograd.grad(loss(m), m)
    assert eager.any()
    assert relative_error(compiled, eager) < 1e-6


def test_either_switch_of_tf32_may_be_used() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert tf32_allowed()
        with full_precision(torch.device(DEVICE)):
            assert not tf32_allowed()
    finally:
        matmul.fp32_precision = before
    assert not tf32_allowed()


@needs_triton
def test_triton_refuses_what_it_cannot_add_up() -> None:
    with backend("triton"), pytest.raises(RankwiseError, match=r"triton on \w+ in torch.float64"):
        masked_matmul(draw(2, N), draw(K, N), draw(K), draw(M, K))
