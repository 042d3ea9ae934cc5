"""The GPU suite's lines: all competitors give the answer at small sizes, goals are the stated ones, and their order."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensors import DEVICE, TRITON_DTYPES, needs_triton

from bench.gpu import fourbit, int8, masked, packed, suite, svd
from bench.gpu.measure import error
from bench.gpu.suite import works
from bench.gpu.work import Work
from rankwise.kernels.backend import backend, chosen

SMALL = [
    *masked.works(70, 64, 32),
    *packed.works(64, 16, 96),
    *fourbit.works(32, 128, 128, tokens=(1, 20)),
    *int8.works(32, 128, 24, tokens=(1, 20)),
]
OTHER_WORK = ("dense cuBLAS", "ours, whole rank", "lowrank", "bitsandbytes")  # how names of such peers begin
ON_A_GPU = ("torch.compile", "dependent launch")
STATED = {
    "K1": {"bandwidth 0.8", "speedup dense 1.5", "speedup two 1.2", "microseconds 6.2"},
    "K2": {"bandwidth 0.8", "speedup dense 2"},
    "K3 16 tokens": {"microseconds 7", "speedup two 1.2"},
    "K3 64 tokens": {"microseconds 9", "speedup two 1.2"},
    "K4": {"speedup two 1"},
    "K5 q,k,v at 0.8": {"speedup dense 1.125"},
    "K5 gate,up at 0.8": {"speedup dense 1.125"},
    "K5 q,k,v at 0.5": {"speedup dense 1.8"},
    "K5 gate,up at 0.5": {"speedup dense 1.8"},
    "P1": {"speedup lowrank 1.2"},
    "Q1 4096x4096, 1 tokens": {"microseconds 3.5", "speedup bitsandbytes 1.2"},
    "Q1 4096x4096, 16 tokens": {"microseconds 4", "speedup bitsandbytes 3"},
    "Q1 4096x4096, 64 tokens": {"microseconds 7", "speedup bitsandbytes 3"},
    "Q2": {"microseconds 3.2"},
    "T1": {"speedup torch eager 1.25", "speedup torch.compile 1.05", "memory torch eager 0.75"},
    "T2 rank 2048": {"speedup ours, whole rank 3.57143"},  # 0.28 of the time
    "S1 224 matrices": {"seconds 35"},
    "S1 a loop": {"speedup torch.linalg.svd 20"},
    "S2 eigh32": {"error 0.0003"},
    "S2 mixed": {"error 0.0003"},
    "S2 refined": {"error 0.0003"},
    "S2 eigh64": {"error 1e-06"},
    "E0": {"error 0"},
    "E1": {"bandwidth 0.75"},
    "E2": {"speedup own dense 1.7", "speedup transformers 3"},
    "E3": {"rate 450"},
    "E4": {"speedup own dense 1.6"},
    "E5": {"speedup own dense 1.12"},
    "E6": {"speedup own dense 0.45"},
}


@needs_triton
@pytest.mark.parametrize("work", SMALL, ids=lambda work: f"{work.id} {work.name}")
def test_ours_and_the_peers_give_the_answer(work: Work) -> None:
    """In PyTorch where the interpreter cannot do bf16."""
    torch.manual_seed(0)
    with backend("auto" if DEVICE == "cuda" else "torch"):
        contest = work.build(torch.device(DEVICE))
        expected = contest.reference()
        assert error(contest.ours(), expected) <= contest.tolerance
        left_out = OTHER_WORK if DEVICE == "cuda" else OTHER_WORK + ON_A_GPU
        same = {name: call for name, call in contest.peers.items() if not name.startswith(left_out)}
        wrong = {name: error(call(), expected) for name, call in same.items()}
    assert all(each <= contest.tolerance for each in wrong.values()), wrong
    assert same or work.id in ("P1", "T2")
    assert torch.bfloat16 in TRITON_DTYPES or DEVICE == "cpu"
    assert work.bytes > 0


@pytest.mark.parametrize("work", SMALL, ids=lambda work: f"{work.id} {work.name}")
def test_peers_of_other_work_run(work: Work) -> None:
    with backend("auto" if DEVICE == "cuda" else "torch"):
        contest = work.build(torch.device(DEVICE))
        answers = {name: call() for name, call in contest.peers.items() if name.startswith(OTHER_WORK)}
        ours = contest.ours()
    for answer in answers.values():
        for y, x in zip(_tensors(answer), _tensors(ours), strict=True):
            assert (y.shape, y.dtype) == (x.shape, x.dtype)


def test_every_goal_names_a_peer_that_is_there() -> None:
    """But for those that only a GPU has."""
    for work in [*SMALL, *svd.works(32, 48, 32, (16,))]:
        peers = work.build(torch.device("cpu")).peers
        for goal in work.goals:
            assert (goal.peer != "") is (goal.figure in ("speedup", "memory"))
            named = any(name.startswith(goal.peer) for name in peers)
            assert named or goal.peer in ("", "torch.compile", "bitsandbytes")


def test_goals_are_as_stated() -> None:
    """Every line with a goal of these ids is in the table, and every entry of the table has a line."""
    seen = set()
    for _, work in works(None):
        if work.goals and work.id.startswith(suite.FIRST):
            goals = {" ".join(filter(None, (goal.figure, goal.peer, f"{goal.at:g}"))) for goal in work.goals}
            keys = [key for key in STATED if key.split()[0] == work.id and key.partition(" ")[2] in work.name]
            assert [STATED[key] for key in keys] == [goals], work.name
            seen |= set(keys)
    assert seen == set(STATED)


def test_every_stated_id_is_reached_before_the_others() -> None:
    """The long ones last among them, then whole models of an id that was there, then other goals, then the rest."""
    order = [work for _, work in works(None)]
    first = [at for at, work in enumerate(order) if work.goals and work.id.startswith(suite.FIRST)]
    assert first == list(range(len(first)))
    ids = " ".join(dict.fromkeys(order[at].id for at in first))
    assert ids == "K1 K2 K3 K4 K5 P1 Q1 Q2 T1 T2 E0 E1 E2 E3 E4 E5 E6 S2 S1"
    long = [at for at in first if order[at].once]
    assert long == list(range(long[0], long[-1] + 1))
    assert all(order[at].tokens for at in range(long[-1] + 1, len(first)))
    others = order[len(first) :]
    assert [bool(work.goals) for work in others] == sorted((bool(work.goals) for work in others), reverse=True)
    assert {work.id[0] for work in others if work.goals} == {"A", "Q", "R"}
    assert others[-1].once


def test_the_suite_finds_its_families_and_picks_by_name() -> None:
    everything = works(None)
    assert {family for family, _ in everything} == {*suite.FAMILIES}
    assert {*suite.FAMILIES} == {
        "attention",
        "engine",
        "fourbit",
        "int8",
        "masked",
        "packed",
        "runtime",
        "speculative",
        "svd",
    }
    assert {work.id for _, work in works(["K1"])} == {"K1"}
    assert {family for family, _ in works(["masked"])} == {"masked"}
    assert len({(work.id, work.name) for _, work in everything}) == len(everything)


def test_the_peer_in_pytorch_stays_there_for_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        y = x.clone()
        y.register_hook(lambda gradient: seen.append(chosen()))
        return y * _[1].sum()

    monkeypatch.setattr(masked, "masked_matmul", forward)
    contest = masked.works(8, 8, 4)[1].build(torch.device(DEVICE))
    contest.ours(), contest.peers["torch eager"]()
    assert seen == ["auto", "torch"]


@pytest.mark.parametrize("work", svd.works(32, 48, 32, (16,))[5:6], ids=lambda work: work.name)
def test_the_fastest_driver_is_known_before_a_loop_is_timed(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same shapes in the same number were decomposed before."""
    seen: list[list[torch.Size]] = []
    plain: Callable[..., Any] = svd.svd
    monkeypatch.setattr(svd, "svd", lambda ws, *more: seen.append([w.shape for w in ws]) or plain(ws, *more))
    contest = work.build(torch.device(DEVICE))
    contest.ours()
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_bitsandbytes_that_fails_is_one_peer_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image")

    library = SimpleNamespace(__version__="0", functional=SimpleNamespace(quantize_4bit=refused))
    monkeypatch.setattr(fourbit, "bitsandbytes", library)
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    ((name, call),) = fourbit._bitsandbytes(x, torch.ones(2, 64)).items()
    assert name.startswith(fourbit.PEER)
    with pytest.raises(RuntimeError, match="no kernel image"):
        call()


def _tensors(answer: Any) -> tuple[torch.Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)
