"""Steps that replay a graph give the tokens of steps without; on a GPU the graphs are captured ones.

On a CPU nothing can be captured. There a replay is the decoder on the graph's own buffers, so that the choice of a
graph, the buffers, the padding and what is cut out of the result are those of a GPU.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from drafting import make_engine
from tensors import DEVICE

from rankwise.engine.runtime.batch import Batch, make_batch
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.graphs import Capture, Graphs, Run, batch_buckets, context_buckets, forward
from rankwise.engine.runtime.loader import convert
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.scheduler import Share
from rankwise.engine.runtime.sequence import Sequence

NEW = 12
GREEDY = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
FAMILIES = ["llama", "mistral", "qwen3", "gemma3"]


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(2, 500) for _ in range(rng.randrange(1, 40))] for _ in range(count)]


def direct(run: Run) -> Run:
    return run


def capture() -> Callable[[Run], Run]:
    return Capture(torch.device(DEVICE)) if DEVICE == "cuda" else direct


def engine(model: Any, *, graphs: bool, most_sequences: int = 7, **options: Any) -> Engine:
    limits = {"most_tokens": 32, "most_length": 80, "most_sequences": most_sequences} | options
    made = Engine(convert(model.to(DEVICE), 128), EngineConfig(60, 4, **limits, graphs=False))
    for cache in (*made.keys, *made.values):
        cache.fill_(7)  # where nothing is written it stays
    if graphs:
        made.forward = Graphs(made.decoder, made.keys, made.values, most_sequences, limits["most_length"], capture())
    return made


def finish(running: Engine, params: SamplingParams = GREEDY, count: int = 12) -> list[list[int]]:
    """Requests that come and go: batches of every size, with prompts between."""
    waiting, sequences = prompts(count), []
    while waiting or running.busy:
        if waiting:
            sequences.append(running.add(waiting.pop(), replace(params, max_tokens=NEW + 2 * len(sequences))))
        running.step()
    return [sequence.output for sequence in sequences]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_without_graphs(tiny: Callable[..., Any], family: str) -> None:
    plain, running = (engine(tiny(family), graphs=graphs) for graphs in (False, True))
    assert finish(running) == finish(plain)
    graphs = running.forward
    assert isinstance(graphs, Graphs)
    assert {size for size, _ in graphs.graphs} == {1, 2, 4, 7}
    assert graphs.replayed > 2 * len(graphs.graphs)
    for ours, theirs in zip((*running.keys, *running.values), (*plain.keys, *plain.values), strict=True):
        assert torch.equal(ours == 7, theirs == 7)  # padding wrote nowhere
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_draws_and_penalties_are_outside(tiny: Callable[..., Any]) -> None:
    params = SamplingParams(max_tokens=NEW, temperature=1.2, top_k=40, seed=5, repetition_penalty=1.2, ignore_eos=True)
    plain, running = (finish(engine(tiny("llama"), graphs=graphs), params) for graphs in (False, True))
    assert running == plain


def test_contexts_have_buckets_too(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.engine.runtime.graphs.SHORTEST", 16)
    plain, running = (engine(tiny("llama"), graphs=graphs, most_sequences=2) for graphs in (False, True))
    assert finish(running) == finish(plain)
    graphs = running.forward
    assert isinstance(graphs, Graphs)
    assert graphs.lengths == [16, 32, 64, 80]
    assert {length for _, length in graphs.graphs} == {16, 32, 64}


def test_buckets() -> None:
    assert batch_buckets(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert batch_buckets(20) == [1, 2, 4, 8, 16, 20]
    assert [batch_buckets(most) for most in (1, 3, 8)] == [[1], [1, 2, 3], [1, 2, 4, 8]]
    assert context_buckets(8192) == [512, 1024, 2048, 4096, 8192]
    assert context_buckets(700) == [512, 700]
    assert context_buckets(80) == [80]


def test_long_pieces_of_prompts_have_no_graph(tiny: Callable[..., Any]) -> None:
    """Each of their tokens would read all keys before it anew."""
    graphs = engine(tiny("llama"), graphs=True, most_sequences=40).forward
    assert isinstance(graphs, Graphs)
    steps = {counts: make_batch(shares(*counts, length=20), 4, torch.device(DEVICE)) for counts in [(8,), (9,), (1, 9)]}
    assert [graphs.bucket(step) is None for step in steps.values()] == [False, True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_a_draft_are_rows_of_a_graph(tiny: Callable[..., Any], family: str) -> None:
    """Logits and cache are those of prefill, for windows, too."""
    plain, running = (engine(tiny(family), graphs=graphs, most_sequences=20) for graphs in (False, True))
    prompt, place = list(range(2, 23)), list(range(50, 38, -1))
    for counts in ((20,), (1, 3, 5), (2,), (3, 4)):  # first a prompt but for its last token, for as many sequences
        steps = []
        for number, count in enumerate(counts):
            sequence = Sequence(prompt, GREEDY)
            sequence.computed = 0 if count == 20 else 20
            sequence.draft = [] if count == 20 else [(5 + number) * step for step in range(1, count)]
            sequence.blocks = [*place[:5], *range(12 * number, 12 * number + 4)]  # what is drafted is its own
            steps.append(Share(sequence, count))
        batch = make_batch(steps, 4, torch.device(DEVICE))
        expected = plain.forward(batch)
        assert len(expected) == (0 if counts == (20,) else sum(counts))
        torch.testing.assert_close(running.forward(batch), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(running.forward, Graphs)
    assert running.forward.replayed == 3
    for ours, theirs in zip((*running.keys, *running.values), (*plain.keys, *plain.values), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [GREEDY, SamplingParams(max_tokens=NEW, seed=3, ignore_eos=True)])
@pytest.mark.parametrize("kind", ["itself", "near"])
def test_a_draft_and_its_model_run_as_graphs(tiny: Callable[..., Any], kind: str, options: SamplingParams) -> None:
    wanted = finish(make_engine(tiny, blocks=200), options)
    running = make_engine(tiny, kind, blocks=200)
    drafter, met = running.drafter, []
    assert drafter is not None
    for holder, rows in ((running, drafter.rows(8)), (drafter, 16)):
        graphs = Graphs(holder.decoder, holder.keys, holder.values, rows, 128, capture())
        choose = graphs.bucket
        graphs.bucket = lambda batch, choose=choose: met.append((len(batch.ids), choose(batch))) or met[-1][1]  # type: ignore[method-assign]
        holder.forward = graphs
    assert finish(running, options) == wanted
    assert drafter.tally.accepted > 0
    assert all(found is not None for tokens, found in met if tokens <= 8)
    assert sum(found is not None for _, found in met) > 20


def shares(*counts: int, length: int = 9) -> list[Share]:
    found = []
    for count in counts:
        sequence = Sequence(list(range(2, 2 + length)), GREEDY)
        sequence.computed, sequence.blocks = length - count, list(range(-(-length // 4)))
        found.append(Share(sequence, count))
    return found


@pytest.mark.parametrize(
    ("step", "bucket"),
    [
        (shares(1), (1, 80)),
        (shares(1, 1, 1), (4, 80)),
        (shares(*[1] * 7), (7, 80)),
        (shares(1, 2), (4, 80)),  # a prompt, or a draft
        (shares(5), (7, 80)),
        (shares(*[1] * 8), None),  # too many
        (shares(1, 7), None),
        (shares(1, length=81), None),  # too long
    ],
)
def test_which_graph(tiny: Callable[..., Any], step: list[Share], bucket: tuple[int, int] | None) -> None:
    graphs = engine(tiny("llama"), graphs=True).forward
    assert isinstance(graphs, Graphs)
    assert graphs.bucket(make_batch(step, 4, torch.device(DEVICE))) == bucket


def test_rows_that_nobody_asked_for_are_left_out(tiny: Callable[..., Any]) -> None:
    """The first token of a prompt may be all that a step has room for."""
    plain, running = (engine(tiny("llama"), graphs=graphs) for graphs in (False, True))
    step = shares(1, 1, 1)
    step[1].sequence.output.append(5)  # one more token is left for the next step
    batch = make_batch(step, 4, torch.device(DEVICE))
    assert batch.last.tolist() == [0, 2]
    found = running.forward(batch)
    assert isinstance(running.forward, Graphs)
    assert running.forward.replayed == 1
    torch.testing.assert_close(found, plain.forward(batch), rtol=1e-5, atol=1e-5)


def test_only_a_gpu_has_graphs(tiny: Callable[..., Any]) -> None:
    made = Engine(convert(tiny("llama").to(DEVICE), 128), EngineConfig(20, 4, most_length=40))
    assert isinstance(made.forward, Graphs) == (DEVICE == "cuda")
    arguments = made.decoder, made.keys, made.values, 8, 40
    assert not isinstance(forward(*arguments, graphs=False), Graphs)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are captured on a GPU")
def test_nothing_waits_for_the_gpu_in_a_replay(tiny: Callable[..., Any]) -> None:
    running = engine(tiny("gemma3"), graphs=True)
    batches = [make_batch(shares(*counts), 4, torch.device(DEVICE)) for counts in ((1, 1), (1, 3))]
    for batch in batches:
        running.forward(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            running.forward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_reads_the_buffers_alone(tiny: Callable[..., Any]) -> None:
    """A graph cannot see a later step's tensors."""
    seen: list[Batch] = []
    running = engine(tiny("llama"), graphs=True)
    graphs = running.forward
    assert isinstance(graphs, Graphs)
    decoder = graphs.decoder
    graphs.decoder = lambda batch, *cache: seen.append(batch) or decoder(batch, *cache)  # type: ignore[assignment]
    for _ in range(3):
        graphs(make_batch(shares(1, 1), 4, torch.device(DEVICE)))
    first = {id(seen[0])}
    assert {id(batch) for batch in seen} == first
    assert seen[0].ids.data_ptr() == graphs.ids.data_ptr()
