"""Sums of outer products against the same sums worked out from what the layers were handed."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.alloc.moments import OCTAVES, GradientSums, InputSums, octaves
from rankwise.errors import RankwiseError


def linear(kind: str, n: int, m: int) -> nn.Module:
    layer = nn.Linear(n, m) if kind == "linear" else Conv1D(m, n)
    return layer.requires_grad_(False)


def outer(rows: torch.Tensor) -> torch.Tensor:
    flat = rows.detach().double().reshape(-1, rows.shape[-1])
    return flat.T @ flat


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_input_moments_are_means_over_all_windows(kind: str) -> None:
    torch.manual_seed(0)
    layer = linear(kind, 5, 3)
    windows = [torch.randn(1, 7, 5) * 10**i for i in range(3)]
    sums = InputSums({"a": layer})
    with sums.listening():
        for x in windows:
            sums.start_window()
            layer(x)
    moments, groups = sums.finish(21)
    assert groups == {"a": "a"}
    assert moments["a"].dtype == torch.float32
    assert close(moments["a"], sum((outer(x) for x in windows), torch.zeros(5, 5)) / 21)
    sizes = sums.magnitudes(21)["a"]
    assert sizes.dtype == torch.float32
    assert close(sizes, torch.cat(windows, 1).double().abs().sum((0, 1)) / 21)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_kept_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 2).to(dtype)
    sums = InputSums({"a": layer})
    x = torch.randn(1, 16, 4).to(dtype)
    with torch.no_grad(), sums.listening():
        for _ in range(600):  # in 16 bits the sum would stop growing
            sums.start_window()
            layer(x)
    moments, _ = sums.finish(16)
    assert close(moments["a"], 600 * outer(x) / 16, 1e-4)
    assert close(sums.magnitudes(16)["a"], 600 * x.double().abs().sum((0, 1)) / 16, 1e-4)


def test_large_half_precision_inputs_do_not_overflow() -> None:
    layer = nn.Linear(2, 2).half()
    sums = InputSums({"a": layer})
    x = torch.full((1, 3, 2), 3e4).half()
    with torch.no_grad(), sums.listening():
        layer(x * 0 + x)
    assert close(sums.finish(3)[0]["a"], outer(x) / 3)


def test_layers_that_share_their_input_share_one_sum() -> None:
    torch.manual_seed(0)
    q, k, o = linear("linear", 5, 3), linear("linear", 5, 2), linear("linear", 5, 4)
    sums = InputSums({"q": q, "k": k, "o": o})
    shared, own = torch.randn(2, 1, 6, 5), torch.randn(2, 1, 6, 5)
    with sums.listening():
        for x, y in zip(shared, own, strict=True):
            sums.start_window()
            q(x)
            k(x)
            o(y)
    moments, groups = sums.finish(12)
    assert groups == {"q": "q", "k": "q", "o": "o"}
    assert moments.keys() == {"q", "o"}
    assert close(moments["q"], outer(shared) / 12)  # counted once, not twice
    assert close(moments["o"], outer(own) / 12)


def test_equal_numbers_in_another_tensor_are_another_input() -> None:
    layers = {"a": linear("linear", 3, 3), "b": linear("linear", 3, 3)}
    sums = InputSums(layers)
    x = torch.randn(4, 3)
    with sums.listening():
        layers["a"](x)
        layers["b"](x.clone())
    moments, groups = sums.finish(4)
    assert groups == {"a": "a", "b": "b"}
    assert close(moments["b"], outer(x) / 4)


def test_inputs_that_lived_one_after_the_other_are_told_apart() -> None:
    torch.manual_seed(0)
    layers = {name: linear("linear", 3, 3) for name in "abcdef"}
    sums = InputSums(layers)
    copies = []
    with sums.listening():
        for layer in layers.values():  # each tensor is free to be forgotten before the next one is made
            x = torch.randn(4, 3)
            copies.append(x.tolist())
            layer(x)
            del x
    moments, groups = sums.finish(4)
    assert groups == {name: name for name in layers}
    for name, rows in zip(layers, copies, strict=True):
        assert close(moments[name], outer(torch.tensor(rows)) / 4)


def test_an_input_changed_in_place_is_another_input() -> None:
    torch.manual_seed(0)
    a, b = linear("linear", 3, 3), linear("linear", 3, 3)
    sums = InputSums({"a": a, "b": b})
    x = torch.randn(4, 3)
    before = x.clone()
    with torch.no_grad(), sums.listening():
        a(x)
        x.mul_(3)
        b(x)
    moments, groups = sums.finish(4)
    assert close(moments[groups["a"]], outer(before) / 4)
    assert close(moments[groups["b"]], 9 * outer(before) / 4)


def test_sharing_may_begin_anew_with_each_window() -> None:
    layers = {"a": linear("linear", 3, 3), "b": linear("linear", 3, 3)}
    sums = InputSums(layers)
    x = torch.randn(4, 3)
    with sums.listening():
        for _ in range(2):
            sums.start_window()
            layers["a"](x)
            layers["b"](x)
    moments, groups = sums.finish(8)
    assert groups == {"a": "a", "b": "a"}
    assert close(moments["a"], 2 * outer(x) / 8)


def test_inputs_of_the_last_window_are_let_go() -> None:
    layer = linear("linear", 3, 3)
    sums = InputSums({"a": layer})
    x = torch.randn(4, 3)
    kept = weakref.ref(x)
    with torch.no_grad(), sums.listening():
        layer(x)
        del x
        sums.start_window()
        assert kept() is None


@pytest.mark.parametrize("fails", [False, True], ids=["end", "exception"])
@pytest.mark.parametrize("sums_class", [InputSums, GradientSums])
def test_nothing_is_counted_after_listening(sums_class: type, fails: bool) -> None:
    layer = linear("linear", 3, 3)
    sums: Any = sums_class({"a": layer})
    x = torch.ones(2, 3).requires_grad_()
    try:
        with sums.listening():
            layer(x).sum().backward()
            if fails:
                raise InterruptedError
    except InterruptedError:
        pass
    counted = sums.sums["a"].clone()
    assert counted.any()
    layer(x).sum().backward()
    assert torch.equal(sums.sums["a"], counted)


def test_gradient_moments_equal_gradients_by_hand() -> None:
    torch.manual_seed(0)
    first, second = linear("linear", 4, 6), linear("conv1d", 6, 3)
    xs, weights = torch.randn(3, 1, 5, 4), torch.randn(3, 1, 5, 3)
    sums = GradientSums({"first": first, "second": second})
    expected = []
    with sums.listening():
        for x, w in zip(xs, weights, strict=True):
            hidden = first(x.clone().requires_grad_())
            (second(torch.tanh(hidden)) * w).sum().backward()
            expected.append((1 - torch.tanh(hidden.detach()) ** 2) * (w @ second.weight.T))
    moments = sums.finish(15)
    inputs = {"first": xs, "second": torch.tanh(first(xs)).detach()}
    for name, g in {"first": torch.stack(expected), "second": weights}.items():
        sizes = g.norm(dim=-1, keepdim=True)
        total = float(sizes.square().sum())
        assert close(moments[name], total / 15 * outer(g / sizes) / 15)
        assert close(moments[f"weighted.{name}"], outer(inputs[name] * sizes) / total)


def test_gradients_are_those_of_the_layer_before_what_happens_to_its_output_in_place() -> None:
    torch.manual_seed(0)
    layer = linear("linear", 4, 6)
    sums = GradientSums({"a": layer})
    weights = torch.randn(5, 6)
    with sums.listening():
        y = layer(torch.randn(5, 4).requires_grad_())
        y.mul_(3)
        (y * weights).sum().backward()
    sizes = 3 * weights.norm(dim=1, keepdim=True)
    assert close(sums.finish(5)["a"], sizes.square().sum() / 5 * outer(3 * weights / sizes) / 5)


def test_octaves_of_positions() -> None:
    assert octaves(16, torch.device("cpu")).tolist() == [0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4]


def test_emphasis_is_what_an_octave_has_over_the_mean() -> None:
    layer = linear("linear", 3, 3)
    sums = GradientSums({"a": layer, "idle": linear("linear", 3, 3)})
    sizes = torch.tensor([[6.0, 1, 3, 2, 2, 2], [4.0, 1, 1, 2, 0, 2]])  # six tokens: three octaves
    with sums.listening():
        for window in sizes:
            (layer(torch.ones(1, 6, 3).requires_grad_()) * window.sqrt()[:, None]).sum().backward()
    found = sums.finish(12)
    by_hand = torch.tensor([5.0, 1.5, 10 / 6] + [10 / 6] * (OCTAVES - 3)) / (26 / 12)
    assert torch.allclose(found["emphasis.a"], by_hand)
    assert torch.equal(found["emphasis.idle"], torch.ones(OCTAVES))


def test_a_layer_used_twice_counts_twice() -> None:
    layer = linear("linear", 3, 3)
    inputs, gradients = InputSums({"a": layer}), GradientSums({"a": layer})
    x, y = torch.randn(4, 3).requires_grad_(), torch.randn(4, 3)
    with inputs.listening(), gradients.listening():
        (layer(x) + 2 * layer(y.requires_grad_())).sum().backward()
    assert close(inputs.finish(4)[0]["a"], (outer(x) + outer(y)) / 4)
    found = gradients.finish(4)  # eight gradients of one direction, four of size 3 and four of size 12 (squared)
    assert close(found["a"], (4 * 3 + 4 * 12) / 8 * torch.ones(3, 3) / 3)
    assert close(found["weighted.a"], (3 * outer(x) + 12 * outer(y)) / 60 * 8 / 4)


def test_a_layer_that_some_tokens_reach() -> None:
    """F is of those that reach it; input moments, weighted or not, are times their share."""
    torch.manual_seed(0)
    layer, x, w = linear("linear", 4, 3), torch.randn(8, 4), torch.randn(2, 3)
    inputs, gradients = InputSums({"a": layer}), GradientSums({"a": layer})
    with inputs.listening(), gradients.listening():
        (layer(x[:2].clone().requires_grad_()) * w).sum().backward()
    found, sizes = gradients.finish(8), w.norm(dim=1, keepdim=True)
    assert close(found["a"], sizes.square().sum() / 2 * outer(w / sizes) / 2)
    assert close(found["weighted.a"], outer(x[:2] * sizes) / sizes.square().sum() * 2 / 8)
    assert close(inputs.finish(8)[0]["a"], outer(x[:2]) / 8)


@pytest.mark.parametrize("size", [1e-8, 1e-25])
def test_gradients_that_are_noise_have_no_direction(size: float) -> None:
    torch.manual_seed(0)
    layer, w = linear("linear", 4, 3), torch.randn(6, 3)
    sums, without = GradientSums({"a": layer}), GradientSums({"a": layer})
    for found, first in ((sums, size), (without, 0.0)):
        with found.listening():
            scale = torch.tensor([[first]] + [[1.0]] * 5)
            (layer(torch.ones(6, 4).requires_grad_()) * w * scale).sum().backward()
    assert close(sums.finish(6)["a"], without.finish(6)["a"].double())


def test_inputs_are_those_of_the_call() -> None:
    """What is written into them afterwards does not count."""
    torch.manual_seed(0)
    layer, x = linear("linear", 4, 3), torch.randn(5, 4)
    sums = GradientSums({"a": layer})
    with sums.listening():
        given = x.clone().requires_grad_() * 1
        y = layer(given)
        given.detach().mul_(100)
        y.sum().backward()
    assert close(sums.finish(5)["weighted.a"], outer(x) / 5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_layers_never_called_have_zero_moments(kind: str) -> None:
    layers = {"used": linear(kind, 3, 2), "idle": linear(kind, 5, 4)}
    inputs, gradients = InputSums(layers), GradientSums(layers)
    with inputs.listening(), gradients.listening():
        layers["used"](torch.ones(2, 3).requires_grad_()).sum().backward()
    moments, groups = inputs.finish(2)
    assert groups["idle"] == "idle"
    assert torch.equal(moments["idle"], torch.zeros(5, 5))
    assert torch.equal(inputs.magnitudes(2)["idle"], torch.zeros(5))
    assert torch.equal(inputs.magnitudes(2)["used"], torch.ones(3))
    found = gradients.finish(2)
    assert torch.equal(found["idle"], torch.zeros(4, 4))
    assert torch.equal(found["weighted.idle"], torch.zeros(5, 5))
    assert moments["used"].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("side", ["inputs", "gradients"])
def test_sums_beyond_fp32_name_the_layer(side: str, value: float) -> None:
    layers = {"fine": linear("linear", 3, 3), "bad": linear("linear", 3, 3)}
    inputs, gradients = InputSums(layers), GradientSums(layers)
    x = torch.ones(2, 3)
    with inputs.listening(), gradients.listening():
        layers["fine"](x.clone().requires_grad_()).sum().backward()
        scale = value if side == "inputs" else 1.0
        y = layers["bad"]((x * scale).requires_grad_())
        y.backward(torch.full_like(y, value if side == "gradients" else 1.0))
    finish: Callable[..., Any] = inputs.finish if side == "inputs" else gradients.finish
    with pytest.raises(RankwiseError, match="NaN or Inf in its") as caught:
        finish(2)
    assert caught.value.field == "bad"
