"""The hypernetwork: shapes, the authors' start, and what its seed fixes."""

import pytest
import torch

from rankwise.alloc.hypernet import HyperNet

SIZES = {"a": 12, "b": 7, "c": 12, "d": 1}


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_layer_gets_a_logit_a_component_in_its_order() -> None:
    net = HyperNet(SIZES, 0)
    assert {name: tuple(logits.shape) for name, logits in net.logits().items()} == {n: (s,) for n, s in SIZES.items()}
    assert list(net.logits()) == list(SIZES)
    assert list(net.ranks()) == list(SIZES)
    assert {name: len(drawn.mask) for name, drawn in net.draw(noise()).items()} == SIZES


def test_a_layer_alone_has_the_logits_that_it_has_in_a_batch() -> None:
    net = HyperNet(SIZES, 0)
    z = net.get_buffer("z12")[1][None]
    states = torch.nn.functional.gelu(net.norm(net.gru(z)[0]))
    torch.testing.assert_close(net.heads[2](states)[0, :, 0] + 3, net.logits()["c"])


def test_nearly_all_is_kept_at_the_start() -> None:
    net = HyperNet({"a": 200}, 0)
    assert net.ranks()["a"] > 199
    assert float(net.logits()["a"].mean()) == pytest.approx(3, abs=1)


def test_the_seed_fixes_the_network_and_leaves_the_callers_randomness_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = HyperNet(SIZES, 1), HyperNet(SIZES, 1), HyperNet(SIZES, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.logits()["b"], same.logits()["b"])
    assert not torch.equal(one.logits()["b"], other.logits()["b"])


def test_all_weights_learn() -> None:
    net = HyperNet(SIZES, 0)
    torch.stack([drawn.soft.sum() + drawn.rank for drawn in net.draw(noise()).values()]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
