"""The masked layer equals its formula, its gradients are true, and a hard mask is the truncated layer itself."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.kernels import lowrank_linear, mask_probe, masked_matmul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
M, N, K = 12, 9, 6
LEADING = [pytest.param(shape, id="x".join(map(str, (*shape, N)))) for shape in [(), (5,), (2, 3), (0,), (2, 1, 3)]]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(prod(shape) + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-300))


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
    hard = torch.zeros(K, dtype=torch.float64)
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
    mask, bias = torch.zeros(size, requires_grad=True), draw(m_out, dtype=dtype)
    for keep, kept in ((rank, torch.arange(rank)), (some, some)):
        stored = v[kept].clone(), u[:, kept].clone(memory_format=torch.contiguous_format)
        assert torch.equal(masked_matmul(x, v, mask, u, bias, keep), lowrank_linear(x, *stored, bias))
        assert torch.equal(masked_matmul(x, v, mask.detach(), u, None, keep), lowrank_linear(x, *stored))


def test_the_masks_gradient_is_summed_in_fp32() -> None:
    """4,096 tokens that each add 1: bf16 would stop at 256."""
    x, one = torch.ones(4096, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    m = torch.ones(1, requires_grad=True)
    masked_matmul(x, one, m, one).sum().backward()
    assert m.grad is not None
    assert m.grad.dtype == torch.float32
    assert float(m.grad) == 4096


def test_the_probe_changes_nothing_and_tells_the_mask_what_components_are_worth() -> None:
    x, v, u, weights = draw(2, 3, N).requires_grad_(), draw(K, N), draw(M, K), draw(2, 3, M)
    m, dense = torch.ones(K, dtype=torch.float64, requires_grad=True), u @ v
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
