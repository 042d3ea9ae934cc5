"""The algebra of one layer's refit, against sums over tokens and brute force."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rankwise.alloc.factors import factorize
from rankwise.alloc.solve import Moments, Outcome, Tensors, best_share, loss, product, refit_layer
from rankwise.errors import RankwiseError
from rankwise.plan import LayerSpec

CPU = torch.device("cpu")
WITH_F = pytest.mark.parametrize("with_f", [True, False], ids=["two-sided", "one-sided"])
SHAPES = pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 8)], ids=["tall", "wide"])


@dataclass
class Toy:
    """One layer in two models: inputs, compressed inputs, what the stream has lost.

    Args:
        m: outputs.
        n: inputs.
        tokens: of each of the two texts.
        seed: fixes everything.
        noise: how far the compressed inputs are off.
    """

    m: int
    n: int
    tokens: int = 60
    seed: int = 0
    noise: float = 0.5
    with_f: bool = True

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.weight = self.random(self.m, self.n)
        self.bend = torch.eye(self.n) + self.noise * self.random(self.n, self.n)
        self.miss = self.random(self.m, self.n)
        root = self.random(self.m, self.m)
        self.f = root @ root.T if self.with_f else None
        self.fit, self.judge = self.text(), self.text()

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).float().double()

    def text(self) -> list[torch.Tensor]:
        """x `[T, n]`, x' `[T, n]` and e `[T, m]`."""
        x = self.random(self.tokens, self.n)
        bent = (x @ self.bend.T + self.noise * self.random(self.tokens, self.n)).float().double()
        return [x, bent, (self.noise * x @ self.miss.T).float().double()]

    def moments(self, text: list[torch.Tensor], *, writes: bool = True) -> Moments:
        """Summed over two windows."""
        sums = Moments.zeros(self.m, self.n, writes=writes, device=CPU)
        for part in (slice(0, 20), slice(20, None)):
            x, bent, lost = (tensor[part] for tensor in text)
            sums.add(x, bent, lost if writes else None)
        return sums

    def direct(self, weight: torch.Tensor, text: list[torch.Tensor], *, writes: bool = True) -> float:
        """`½ E‖F^½ (t - Ŵ x')‖²`, token by token."""
        x, bent, lost = text
        short = x @ self.weight.T + (lost if writes else 0) - bent @ weight.T
        f = torch.eye(self.m, dtype=torch.float64) if self.f is None else self.f
        return float(torch.stack([row @ f @ row for row in short]).mean()) / 2

    def of_moments(self, weight: torch.Tensor, text: list[torch.Tensor], *, writes: bool = True) -> float:
        sums = self.moments(text, writes=writes)
        return loss(weight, self.f, sums.inputs(), sums.targets(self.weight))

    def factors(self, rank: int) -> Tensors:
        """Truncated in the metric of the dense model's own inputs."""
        x = self.fit[0]
        found = factorize(self.weight, x.T @ x / len(x), self.f)
        return {"u": found.u[:, :rank], "v": found.v[:rank]}

    def refit(self, kind: str, rank: int, old: Tensors) -> tuple[Tensors, Outcome]:
        spec = LayerSpec(kind, self.m, self.n, rank)
        return refit_layer(self.weight, spec, old, self.moments(self.fit), self.moments(self.judge), self.f)


@SHAPES
@WITH_F
@pytest.mark.parametrize("writes", [True, False])
def test_moments_are_those_of_the_tokens(m: int, n: int, with_f: bool, writes: bool) -> None:
    toy = Toy(m, n, with_f=with_f)
    sums = toy.moments(toy.fit, writes=writes)
    x, bent, lost = toy.fit
    target = x @ toy.weight.T + (lost if writes else 0)
    assert sums.tokens == 60
    assert torch.allclose(sums.inputs(), bent.T @ bent / 60, atol=1e-5)
    assert torch.allclose(sums.targets(toy.weight), target.T @ bent / 60, atol=1e-4)


@pytest.mark.parametrize("writes", [True, False])
def test_a_weight_counts_a_token_so_often(writes: bool) -> None:
    toy = Toy(7, 5)
    x, bent, lost = (tensor[:3] for tensor in toy.fit)
    weighted, repeated = (Moments.zeros(7, 5, writes=writes, device=CPU) for _ in range(2))
    weighted.add(x, bent, lost, torch.tensor([1.0, 3.0, 0.0]))
    for row in (0, 1, 1, 1):
        repeated.add(x[row : row + 1], bent[row : row + 1], lost[row : row + 1])
    assert weighted.tokens == repeated.tokens == 4
    assert torch.allclose(weighted.inputs(), repeated.inputs(), atol=1e-6)
    assert torch.allclose(weighted.targets(toy.weight), repeated.targets(toy.weight), atol=1e-5)


@SHAPES
@WITH_F
@pytest.mark.parametrize("writes", [True, False])
def test_loss_is_that_of_the_tokens_up_to_a_constant(m: int, n: int, with_f: bool, writes: bool) -> None:
    toy = Toy(m, n, with_f=with_f)
    others = [torch.zeros(m, n, dtype=torch.float64), toy.weight, toy.random(m, n), 3 * toy.random(m, n)]
    constants = [toy.direct(w, toy.fit, writes=writes) - toy.of_moments(w, toy.fit, writes=writes) for w in others]
    assert max(constants) - min(constants) < 1e-5 * abs(constants[0])
    assert toy.of_moments(others[0], toy.fit) == 0.0


@WITH_F
@pytest.mark.parametrize(
    ("length", "inside"), [(1.0, None), (-1.0, 0.0), (0.01, 1.0), (8.0, None)], ids=["step", "back", "short", "long"]
)
def test_best_share_is_the_least_of_a_grid(length: float, inside: float | None, with_f: bool) -> None:
    toy = Toy(7, 5, with_f=with_f, tokens=400)
    x, bent, lost = toy.fit
    best = torch.linalg.lstsq(bent, x @ toy.weight.T + lost).solution.T
    step, sums = length * (best - toy.weight), toy.moments(toy.judge)
    found = best_share(toy.weight, step, toy.f, sums.inputs(), sums.targets(toy.weight))
    grid = torch.linspace(0, 1, 501, dtype=torch.float64)
    losses = torch.tensor([toy.of_moments(toy.weight + float(a) * step, toy.judge) for a in grid])
    assert found == pytest.approx(float(grid[losses.argmin()]), abs=0.0021)
    assert found == inside if inside is not None else 0.05 < found < 1


def test_a_step_that_leads_nowhere_has_no_share() -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert best_share(zero, zero, None, torch.eye(3).double(), zero) == 0.0


@WITH_F
@SHAPES
@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
def test_the_held_out_loss_never_rises(m: int, n: int, kind: str, with_f: bool) -> None:
    """Short texts on which least squares alone does harm, and long ones that it gains from."""
    fell = 0
    for seed in range(12):
        toy = Toy(m, n, tokens=(8, 24, 300)[seed % 3], seed=seed, noise=(0.02, 0.5)[seed % 2], with_f=with_f)
        old = {} if kind == "dense" else toy.factors(2)
        new, outcome = toy.refit(kind, min(m, n) if kind == "dense" else 2, old)
        before = toy.direct(product(old).double() if old else toy.weight, toy.judge)
        after = toy.direct(product(new).double() if new else toy.weight, toy.judge)
        assert before - after == pytest.approx(outcome.gain, rel=1e-3, abs=1e-5 * before)
        if outcome.share is None:
            assert new.keys() == old.keys()
            assert all(torch.equal(new[part], old[part]) for part in old)
        else:
            assert after < before
            assert 0 <= outcome.share <= 1
            fell += 1
    assert fell > 3


@WITH_F
def test_a_dense_layer_goes_as_far_as_the_judges_like_best(with_f: bool) -> None:
    """Eight tokens say something, and least squares believes too much of it."""
    toy = Toy(7, 5, tokens=8, seed=4, with_f=with_f)
    toy.judge = Toy(7, 5, tokens=400, seed=4, with_f=with_f).judge
    new, outcome = toy.refit("dense", 5, {})
    assert outcome.share is not None
    assert 0.05 < outcome.share < 0.95
    step = (new["weight"].double() - toy.weight) / outcome.share
    losses = [toy.of_moments(toy.weight + a * step, toy.judge) for a in torch.linspace(0, 1, 21).tolist()]
    assert toy.of_moments(new["weight"].double(), toy.judge) <= min(losses)


def test_old_factors_stay_where_new_ones_do_harm() -> None:
    """The text that is fitted to says nothing about the text that judges."""
    toy = Toy(6, 6, tokens=8, noise=0.0)
    toy.judge[1] = toy.judge[0]
    toy.fit[1] = toy.random(8, 6)
    x = toy.judge[0]
    ideal = factorize(toy.weight, x.T @ x / len(x), toy.f)
    old = {"u": ideal.u[:, :2], "v": ideal.v[:2]}
    new, outcome = toy.refit("lowrank", 2, old)
    assert outcome == Outcome(None, 0.0)
    assert all(torch.equal(new[part], old[part]) for part in old)


@WITH_F
def test_of_its_rank_it_is_the_best(with_f: bool) -> None:
    """With one text for both parts no other matrix of rank 2 does better: not after long alternating descent."""
    toy = Toy(6, 5, tokens=500, with_f=with_f)
    toy.judge = toy.fit
    new, outcome = toy.refit("lowrank", 2, toy.factors(2))
    assert outcome.share == pytest.approx(1, abs=1e-3)
    found = toy.direct(product(new).double(), toy.fit)
    u, v = (toy.random(*shape).requires_grad_() for shape in ((6, 2), (2, 5)))
    sums = toy.moments(toy.fit)
    c, t, f = sums.inputs(), sums.targets(toy.weight), torch.eye(6).double() if toy.f is None else toy.f
    optimiser = torch.optim.LBFGS([u, v], max_iter=400, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimiser.zero_grad()
        w = u @ v
        value = (f * (w @ c @ w.T - 2 * w @ t.T)).sum()
        value.backward()
        return value

    optimiser.step(closure)
    other = toy.direct((u @ v).detach(), toy.fit)
    assert found <= other * (1 + 1e-3)
    assert found < toy.direct(product(toy.factors(2)).double(), toy.fit) * 0.98


@WITH_F
@SHAPES
def test_equal_inputs_leave_a_layer_that_lost_nothing_as_it_was(m: int, n: int, with_f: bool) -> None:
    """Dense, or of a rank that its weight has: what rounding gains is no gain."""
    for seed in range(8):
        toy = Toy(m, n, seed=seed, with_f=with_f)
        toy.weight = (toy.random(m, 2) @ toy.random(2, n)).float().double()
        for text in (toy.fit, toy.judge):
            text[1], text[2] = text[0], torch.zeros(toy.tokens, m, dtype=torch.float64)
        assert toy.refit("dense", min(m, n), {}) == ({}, Outcome(None, 0.0))
        old = toy.factors(2)
        new, outcome = toy.refit("lowrank", 2, old)
        assert outcome == Outcome(None, 0.0)
        assert all(torch.equal(new[part], old[part]) for part in old)


@pytest.mark.parametrize("which", ["fit", "judge"])
def test_a_text_that_never_reaches_the_layer_changes_nothing(which: str) -> None:
    toy, old = Toy(6, 5), Toy(6, 5).factors(2)
    none = Moments.zeros(6, 5, writes=True, device=CPU)
    texts = {"fit": toy.moments(toy.fit), "judge": toy.moments(toy.judge)} | {which: none}
    new, outcome = refit_layer(toy.weight, LayerSpec("lowrank", 6, 5, 2), old, *texts.values(), toy.f)
    assert outcome == Outcome(None, 0.0)
    assert all(torch.equal(new[part], old[part]) for part in old)


def test_dead_inputs_are_no_error() -> None:
    toy = Toy(6, 5)
    for text in (toy.fit, toy.judge):
        text[0], text[1] = torch.zeros(60, 5, dtype=torch.float64), torch.zeros(60, 5, dtype=torch.float64)
    old = toy.factors(2)
    assert toy.refit("lowrank", 2, old)[1] == Outcome(None, 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["dense", "compressed", "lost"])
@pytest.mark.parametrize("which", ["fit", "judge"])
def test_activations_that_are_no_numbers_are_refused(which: str, part: int, value: float) -> None:
    toy = Toy(6, 5)
    getattr(toy, which)[part][3, 2] = value
    with pytest.raises(RankwiseError, match=r"^activations: NaN or Inf in the compressed model; try --dtype"):
        toy.refit("lowrank", 2, Toy(6, 5).factors(2))
