"""The runtime: decode steps of whole models against its own dense model and transformers' `generate` (E0 to E5).

Models are of the shape of Llama-2-7B with random numbers. A time is that of one step, from the scheduler to the tokens
in host memory, by the wall clock: what a server would see. Prompts are read before, and steps are CUDA graphs.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch

from bench.gpu.models import Kind, Shape, llama, specs
from bench.gpu.work import Contest, Goal, Work, built, reason
from rankwise.engine.runtime.batch import Batch
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.graphs import Graphs
from rankwise.engine.runtime.loader import convert
from rankwise.engine.runtime.params import SamplingParams
from rankwise.kernels.backend import backend

BLOCK = 16  # tokens of a block of the cache
PROMPT, NEW, PEER_NEW = 128, 64, 32  # tokens; the peer is slow
ROUNDS = 4
LONGEST = 512  # tokens: graphs are captured for as many
TOLERANCE = 0.05  # of logits in bf16 against transformers' in bf16, whose rounding differs in every layer
DENSE, INT4 = Kind(), Kind(int4=True)
LLAMA = Shape()  # Llama-2-7B's
SMALL = Shape(256, 4, 4, 384, 512)  # for the tokens
TOKENS = {
    "dense": (DENSE,),
    "low-rank, pivot and dense": (Kind("lowrank", 0.5), Kind("pivot", 0.5), DENSE),
    "int4 and others": (INT4, Kind("lowrank", 0.6, int4=True, asymmetric=True), Kind("pivot", 0.6, int4=True), DENSE),
}
Run = Callable[[], list[float]]


def works(shape: Shape = LLAMA, small: Shape = SMALL, many: int = 64) -> list[Work]:
    """The lines of this family; sizes are parameters so that they can be tried where there is no GPU."""
    own, both = ("own dense",), ("own dense", "transformers")
    half = (Goal("speedup", 1.7, "own dense"), Goal("speedup", 3.0, "transformers"))
    half_many, most = (Goal("speedup", 1.6, "own dense"),), (Goal("speedup", 1.12, "own dense"),)
    return [
        *[tokens(small, name, kinds) for name, kinds in TOKENS.items()],
        decoding("E1", shape, DENSE, 1, ("transformers",), (Goal("bandwidth", 0.75),)),
        decoding("E2", shape, Kind("lowrank", 0.5), 1, both, half),
        decoding("E3", shape, INT4, 1, (), (Goal("rate", 450),)),
        decoding("E4", shape, Kind("lowrank", 0.5), many, own, half_many),
        decoding("E5", shape, Kind("pivot", 0.8), 1, own, most),
        decoding("E2", shape, Kind("pivot", 0.5), 1, both, half),
        decoding("E4", shape, Kind("pivot", 0.5), many, own, half_many),
        decoding("E5", shape, Kind("lowrank", 0.8), 1, own, most),
        decoding("E5", shape, Kind("pivot", 0.8), many, own, most),
    ]


def tokens(shape: Shape, name: str, kinds: Sequence[Kind], count: int = 8, new: int = 16) -> Work:
    """Greedy tokens of a small model in fp32: those of transformers, every one. Its time is not a result."""

    def build(device: torch.device) -> Contest:
        torch.manual_seed(0)
        model = llama(shape, kinds, device, torch.float32)
        asked = [ids[: 5 + 3 * at] for at, ids in enumerate(torch.randint(shape.vocabulary, (count, 64)).tolist())]
        with backend("torch"):
            expected = torch.stack([generated(model, ids, new)[0] for ids in asked])
        running = engine_of(model, count)

        def ours() -> torch.Tensor:
            sequences = [running.add(ids, greedy(new)) for ids in asked]
            while running.busy:
                running.step()
            require_graphs(running)
            return torch.tensor([sequence.output for sequence in sequences], device=device)

        return Contest(ours, {}, lambda: expected, 0.0, lambda: ({"ours": [timed(ours)]}, {}))

    size = new * sum(spec.bytes for spec in specs(shape, kinds, torch.float32).values())
    title = f"greedy tokens are transformers', {name}: {count} x {new}, fp32"
    return Work("E0", title, build, size, goals=(Goal("error", 0.0),), cold=False, graph=False)


def decoding(id_: str, shape: Shape, kind: Kind, count: int, peers: Sequence[str], goals: tuple[Goal, ...]) -> Work:
    """Steps of `count` sequences at once. Logits are compared with those of transformers' own arithmetic first."""

    def build(device: torch.device) -> Contest:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        prompts = torch.randint(shape.vocabulary, (count, PROMPT))
        start = prompts[:, : PROMPT - BLOCK + 1]
        model = llama(shape, [kind], device, dtype, LONGEST)
        with backend("torch"), torch.inference_mode():
            expected = model(start.to(device), logits_to_keep=1, use_cache=False).logits[:, -1]
        running = engine_of(model, count)
        runs: dict[str, Run] = {"ours": partial(steps, running, prompts.tolist())}
        if isinstance(running.forward, Graphs):
            runs["its graph alone"] = partial(replays, running.forward, count)
        for name in peers:
            title = name if name == "own dense" else f"{name} {version(name)} generate, dense"
            runs[title] = built(partial(peer, name, shape, prompts, device, dtype))
        ours = partial(last_logits, running, start.tolist())
        return Contest(ours, {}, lambda: expected, TOLERANCE, partial(in_turn, runs))

    dtype = torch.bfloat16
    layers = specs(shape, [kind], dtype).values()
    numbers, dense = sum(spec.parameters for spec in layers), sum(spec.dense_parameters for spec in layers)
    keys = count * (PROMPT + NEW // 2) * shape.kv_bytes(dtype)  # of a step in the middle
    moved = sum(spec.bytes for spec in layers) + shape.other_bytes(dtype) + keys
    flops = 2 * count * (numbers + shape.vocabulary * shape.hidden)
    title = f"batch {count}, {kind}, {100 * numbers / dense:.1f} % kept, {shape.layers} blocks of {shape.hidden}, bf16"
    return Work(id_, title, build, moved, flops, goals, cold=False, graph=False, tokens=count)


def peer(name: str, shape: Shape, prompts: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Run:
    """Steps of a dense model, by our engine or, of one sequence, by transformers."""
    model = llama(shape, [DENSE], device, dtype, LONGEST)
    if name == "own dense":
        return partial(steps, engine_of(model, len(prompts)), prompts.tolist())
    return partial(peer_steps, model, prompts[0].tolist())


def engine_of(model: Any, count: int) -> Engine:
    """Room for `count` sequences, whose prompts are read in one step; the model is empty afterwards."""
    blocks = max(count * (-(-(PROMPT + NEW) // BLOCK) + 1), LONGEST // BLOCK)
    config = EngineConfig(blocks, BLOCK, most_sequences=count, most_tokens=count * PROMPT, most_length=LONGEST)
    return Engine(convert(model, LONGEST), config)


def greedy(new: int) -> SamplingParams:
    """The likeliest tokens, so many."""
    return SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)


def last_logits(engine: Engine, prompts: list[list[int]]) -> torch.Tensor:
    """Logits `[prompts, vocabulary]` after each prompt, of a step that decodes: all but the last token is read before.

    Args:
        engine: that shares prefixes.
        prompts: one token more than whole blocks.
    """
    seen: list[torch.Tensor] = []
    plain = engine.forward

    def noted(batch: Batch) -> torch.Tensor:
        seen.append(plain(batch).clone())
        return seen[-1]

    for end in (-1, None):
        for prompt in prompts:
            engine.add(prompt[:end], greedy(1))
        engine.forward = noted
        while engine.busy:
            engine.step()
        engine.forward = plain
    require_graphs(engine)
    return seen[-1]


def require_graphs(engine: Engine) -> None:
    """Raise a RuntimeError where steps on a GPU were no graphs."""
    ran = isinstance(engine.forward, Graphs) and engine.forward.replayed
    if engine.decoder.embed.is_cuda and not ran:
        raise RuntimeError("no step ran as a CUDA graph")


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call that waits for the device itself."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def steps(engine: Engine, prompts: list[list[int]]) -> list[float]:
    """Seconds of each step in which all sequences decode."""
    sequences = [engine.add(prompt, greedy(NEW)) for prompt in prompts]
    while not all(sequence.output for sequence in sequences):
        engine.step()
    found = []
    while engine.busy:
        found.append(timed(engine.step))  # its tokens are in host memory when it returns
    return found


def replays(graphs: Graphs, count: int) -> list[float]:
    """Seconds of the last step's graph once more, without scheduler, inputs and tokens; what it writes is there."""

    def replay() -> None:
        graphs.graphs[count, LONGEST]()
        torch.cuda.synchronize()

    return [timed(replay) for _ in range(NEW)]


class Stamps:
    """A streamer of `generate` that notes when each token came to host memory."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, then a token at a time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def generated(model: Any, prompt: list[int], new: int) -> tuple[torch.Tensor, list[float]]:
    """Greedy tokens by transformers, and seconds of each step after the first."""
    ids, stamps = torch.tensor([prompt], device=model.device), Stamps()
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stamps, **options)
    return found[0, len(prompt) :], [end - start for start, end in pairwise(stamps.times[1:])]


def peer_steps(model: Any, prompt: list[int]) -> list[float]:
    """Seconds of each step of transformers."""
    return generated(model, prompt, PEER_NEW)[1]


def in_turn(runs: dict[str, Run], rounds: int = ROUNDS) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every step of all rounds; and peers that would not run, with the reason.

    The competitors take turns, after one round that does not count.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    broken: dict[str, str] = {}
    for number in range(rounds + 1):
        for name in list(found):
            try:
                seconds = runs[name]()
            except Exception as problem:
                if name == "ours":
                    raise
                broken[name] = reason(problem)
                del found[name]
            else:
                found[name] += seconds if number else []
    return found, broken
