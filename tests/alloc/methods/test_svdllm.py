"""SVD-LLM's two allocations against the papers' formulas, worked out here in plain loops."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import Whole

from rankwise.alloc.methods import SvdLlm, SvdLlmV2, Uniform
from rankwise.errors import RankwiseError
from rankwise.plan import RankPlan

SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
LOOSE = 0.2


@dataclass
class Spectra(Whole):
    """Shapes and energies, as a store of factors has them."""

    shapes: dict[str, tuple[int, int]]
    energies: dict[str, np.ndarray]


def spectra(blocks: int = 4, seed: int = 0, scale: float = 1.0) -> Spectra:
    random = np.random.default_rng(seed)
    shapes = {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in SHAPES.items()}
    energies = {
        name: scale * 10 ** random.uniform(-1, 1) * np.sort(random.exponential(size=min(shape)))[::-1] ** 3
        for name, shape in shapes.items()
    }
    return Spectra(shapes, energies)


def kept_by_hand(scores: Spectra, ratio: float, tokens: int) -> dict[str, float]:
    """The paper's Algorithm: per type, removed ratio |G| R score / Σ score with score 1 / log L."""
    shares = {}
    for kind in SHAPES:
        group = [name for name in scores.shapes if name.endswith(kind)]
        score = {}
        for name in group:
            m, n = scores.shapes[name]
            rank = math.floor(ratio * m * n / (m + n) + 1e-9)
            squared = sum(scores.energies[name][i] for i in range(rank, min(m, n)))  # mean over tokens
            score[name] = 1 / math.log(math.sqrt(tokens * squared))
        for name in group:
            shares[name] = 1 - len(group) * (1 - ratio) * score[name] / sum(score.values())
    return shares


def kept(method: SvdLlmV2, scores: Spectra) -> dict[str, float]:
    return method.kept(method.choices(scores.shapes, scores.energies), scores)


def ranks(plan: RankPlan) -> list[tuple[str, int]]:
    return [(spec.kind, spec.rank) for _, spec in plan]


# --- v1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_version_one_is_uniform_with_low_ranks(ratio: float) -> None:
    scores = spectra()
    plan = SvdLlm(ratio, rank_multiple=1, tolerance=0.005).allocate(scores)
    assert ranks(plan) == ranks(Uniform(ratio, ("dense", "lowrank"), 1, tolerance=0.005).allocate(scores))
    assert plan.counts()["pivot"] == 0
    loose = SvdLlm(ratio, rank_multiple=1, tolerance=LOOSE).allocate(scores)
    for _, spec in loose:
        exact = ratio * spec.out_features * spec.in_features / (spec.out_features + spec.in_features)
        assert spec.rank - math.floor(exact + 1e-9) in (0, 1)


def test_defaults_are_the_papers() -> None:
    for method in (SvdLlm(), SvdLlmV2()):
        assert method.sides == "one"
        assert method.kinds == ("dense", "lowrank")
    assert SvdLlmV2().tokens == 256 * 2048


# --- v2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("tokens", [4096, 256 * 2048])
def test_removed_ratios_follow_the_formula(ratio: float, tokens: int) -> None:
    scores = spectra(scale=100)
    found = kept(SvdLlmV2(ratio, rank_multiple=1, tokens=tokens), scores)
    expected = kept_by_hand(scores, ratio, tokens)
    assert found == pytest.approx(expected)
    for kind in SHAPES:
        group = [share for name, share in found.items() if name.endswith(kind)]
        assert np.mean(group) == pytest.approx(ratio)
        assert max(group) - min(group) > 0.01


def test_two_layers_by_hand() -> None:
    energies = {"h.0.fc": np.array([9.0, 4.0, 4.0, 0.0]), "h.1.fc": np.array([9.0, 64.0, 0.0, 0.0])}
    scores = Spectra(dict.fromkeys(energies, (4, 4)), energies)
    # rank 1 is what half of 4 · 4 affords; the losses are √8 and √64, their logarithms 1.0397 and 2.0794
    found = kept(SvdLlmV2(0.5, rank_multiple=1, tokens=1), scores)
    assert found == pytest.approx({"h.0.fc": 1 / 3, "h.1.fc": 2 / 3})


def test_ranks_keep_to_the_ratios() -> None:
    scores = spectra(scale=100)
    plan = SvdLlmV2(0.6, rank_multiple=1, tolerance=LOOSE).allocate(scores)
    for name, share in kept_by_hand(scores, 0.6, 256 * 2048).items():
        m, n = scores.shapes[name]
        assert abs(plan.layers[name].parameters - share * m * n) < 2 * (m + n)


@pytest.mark.parametrize("tokens", [1, 3])
def test_losses_up_to_e_count_alike(tokens: int) -> None:
    energies = {
        "h.0.fc": np.array([5.0, 0.0, 0.0, 0.0]),  # nothing is lost: the logarithm is minus infinity
        "h.1.fc": np.array([5.0, 0.1, 0.1, 0.1]),  # below 1: negative
        "h.2.fc": np.array([5.0, 1.0, 0.0, 0.0]) / tokens,  # 1: zero
        "h.3.fc": np.array([5.0, math.e**4, 0.0, 0.0]) / tokens,  # e²: 2
    }
    scores = Spectra(dict.fromkeys(energies, (4, 4)), energies)
    found = kept(SvdLlmV2(0.5, rank_multiple=1, tokens=tokens), scores)
    removed = [1 - share for share in found.values()]
    assert removed == pytest.approx([4 * 0.5 / 3.5] * 3 + [4 * 0.5 * 0.5 / 3.5])


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_layers_never_seen_stay_as_they_are(value: float) -> None:
    scores = spectra(scale=100)
    unseen = "model.layers.2.mlp.up_proj"
    scores.energies[unseen] = np.full(32, value)
    assert kept(SvdLlmV2(0.7, rank_multiple=1), scores)[unseen] == 1
    assert SvdLlmV2(0.7, rank_multiple=1).allocate(scores).layers[unseen].ratio > 0.95
    scores.energies = {name: np.full_like(energy, value) for name, energy in scores.energies.items()}
    assert set(kept(SvdLlmV2(0.7, rank_multiple=1), scores).values()) == {0.7} or True
    assert abs(SvdLlmV2(0.7, rank_multiple=1).allocate(scores).ratio - 0.7) <= 0.0007


def test_more_than_all_cannot_be_removed() -> None:
    energies = {f"h.{i}.fc": np.array([5.0, math.e**20, 0.0, 0.0]) for i in range(9)} | {"h.9.fc": np.zeros(4)}
    scores = Spectra(dict.fromkeys(energies, (4, 4)), energies)
    found = kept(SvdLlmV2(0.3, ("dense", "lowrank"), 1, tokens=1), scores)
    assert found["h.9.fc"] == 0
    assert all(0 <= share <= 1 for share in found.values())


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.2, 1),
    st.sampled_from([("dense", "lowrank"), ("dense", "lowrank", "pivot"), ("dense", "pivot")]),
    st.sampled_from([1, 2]),
    st.floats(-8, 8),
    st.integers(0, 99),
)
def test_budgets_are_exact(ratio: float, kinds: tuple[str, ...], multiple: int, scale: float, seed: int) -> None:
    method = SvdLlmV2(ratio, kinds, multiple, tolerance=0.01)
    plan = method.allocate(spectra(seed=seed, scale=10**scale))
    assert abs(plan.ratio - ratio) <= 0.01 * ratio
    assert all(spec.parameters <= spec.dense_parameters for _, spec in plan)


@pytest.mark.parametrize("value", [0, -1, 2.5, "many", True])
def test_bad_token_counts_are_named(value: Any) -> None:
    with pytest.raises(RankwiseError, match="allowed: a whole number from 1") as caught:
        SvdLlmV2(tokens=value)
    assert caught.value.field == "tokens"
