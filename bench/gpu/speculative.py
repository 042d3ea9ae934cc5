"""Speculative decoding: what a pass costs in which a draft in 4 bits guesses and its dense model verifies (E0 and E6).

Numbers are random, so guesses are hardly ever right and tokens a second would say nothing: what is timed is a pass,
against a step of the model alone. Its share of the speed is the number of tokens that a pass must bring to pay.
"""

from functools import partial
from typing import Any

import torch

from bench.gpu.engine import (
    DENSE,
    INT4,
    LLAMA,
    LONGEST,
    NEW,
    PROMPT,
    SMALL,
    TOLERANCE,
    Run,
    engine_of,
    greedy,
    in_turn,
    last_logits,
    peer,
    require_graphs,
    timed,
)
from bench.gpu.models import Kind, Shape, llama, specs
from bench.gpu.work import Contest, Goal, Work, built
from rankwise.engine.runtime.draft import make_drafter
from rankwise.engine.runtime.engine import Engine
from rankwise.engine.runtime.loader import convert
from rankwise.kernels.backend import backend

GUESSES = 3  # tokens that are drafted for a pass


def works(shape: Shape = LLAMA, small: Shape = SMALL) -> list[Work]:
    """The lines of this family; sizes are parameters so that they can be tried where there is no GPU."""
    return [same_tokens(small), passes("E6", shape, 1, (Goal("speedup", 0.45, "own dense"),))]


def same_tokens(shape: Shape, count: int = 8, new: int = 16) -> Work:
    """Greedy tokens with a draft that is right and with one that is not: those without, every one."""

    def build(device: torch.device) -> Contest:
        asked = [ids[: 5 + 3 * at] for at, ids in enumerate(torch.randint(shape.vocabulary, (count, 64)).tolist())]
        contestants = [_engine(shape, draft, count, device, torch.float32) for draft in (None, DENSE, INT4)]

        def tokens(running: Engine) -> torch.Tensor:
            sequences = [running.add(ids, greedy(new)) for ids in asked]
            while running.busy:
                running.step()
            _require_drafts(running)
            return torch.tensor([sequence.output for sequence in sequences], device=device)

        alone, *drafting = contestants
        ours = lambda: torch.cat([tokens(running) for running in drafting])  # noqa: E731
        exact = lambda: tokens(alone).repeat(len(drafting), 1)  # noqa: E731
        return Contest(ours, {}, exact, 0.0, lambda: ({"ours": [timed(ours)]}, {}))

    size = new * sum(spec.bytes for spec in specs(shape, [DENSE], torch.float32).values())
    title = f"greedy tokens with a draft are those without: {count} x {new}, fp32"
    return Work("E0", title, build, size, goals=(Goal("error", 0.0),), cold=False, graph=False)


def passes(id_: str, shape: Shape, count: int, goals: tuple[Goal, ...]) -> Work:
    """Passes of `count` sequences at once; the logits of the model beside its draft are compared first."""

    def build(device: torch.device) -> Contest:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        prompts = torch.randint(shape.vocabulary, (count, PROMPT), generator=torch.Generator().manual_seed(0))
        start = prompts[:, : PROMPT - 15]
        torch.manual_seed(0)
        model = llama(shape, [DENSE], device, dtype, LONGEST)
        with backend("torch"), torch.inference_mode():
            expected = model(start.to(device), logits_to_keep=1, use_cache=False).logits[:, -1]
        del model
        running = _engine(shape, INT4, count, device, dtype)
        runs: dict[str, Run] = {"ours": partial(drafted, running, prompts.tolist())}
        runs["own dense"] = built(partial(peer, "own dense", shape, prompts, device, dtype))
        ours = partial(last_logits, running, start.tolist())
        return Contest(ours, {}, lambda: expected, TOLERANCE, partial(in_turn, runs))

    dense, small = (sum(s.bytes for s in specs(shape, [kind], torch.bfloat16).values()) for kind in (DENSE, INT4))
    keys = count * (PROMPT + NEW // 2) * shape.kv_bytes(torch.bfloat16)
    moved = dense + GUESSES * small + (GUESSES + 1) * (shape.other_bytes(torch.bfloat16) + keys)
    title = f"batch {count}, a pass: {GUESSES} guessed in int4 by 64, verified dense, {shape.layers} blocks, bf16"
    return Work(id_, title, build, moved, 0, goals, cold=False, graph=False)


def drafted(engine: Engine, prompts: list[list[int]]) -> list[float]:
    """Seconds of each pass in which all sequences get a whole draft; the first, which reads the prompts, left out."""
    sequences = [engine.add(prompt, greedy(NEW)) for prompt in prompts]
    tally, found = engine.speculation, []
    assert tally is not None
    while engine.busy:
        whole = all(sequence.output and NEW - len(sequence.output) > GUESSES for sequence in sequences)
        before = tally.drafted
        seconds = timed(engine.step)
        if whole and tally.drafted - before == GUESSES * len(prompts):
            found.append(seconds)
    _require_drafts(engine)
    return found[1:]


def _engine(shape: Shape, draft: Kind | None, count: int, device: torch.device, dtype: torch.dtype) -> Engine:
    """The dense model, always of the same numbers; a dense draft is the model itself."""

    def model(kind: Kind) -> Any:
        torch.manual_seed(0)
        return llama(shape, [kind], device, dtype, LONGEST)

    alone = engine_of(model(DENSE), count)
    if draft is None:
        return alone
    drafter = make_drafter(convert(model(draft), LONGEST), alone.config, GUESSES, count)
    return Engine(alone.decoder, alone.config, drafter=drafter)


def _require_drafts(engine: Engine) -> None:
    """Raise a RuntimeError where a draft is to be there and guessed nothing, or steps on a GPU were no graphs."""
    require_graphs(engine)
    tally = engine.speculation
    if engine.drafter is not None and not (tally and tally.checks and _graphs_of_draft(engine)):
        raise RuntimeError("no draft was verified, or its steps were no graphs")


def _graphs_of_draft(engine: Engine) -> bool:
    drafter = engine.drafter
    assert drafter is not None
    return bool(getattr(drafter.forward, "replayed", not drafter.decoder.embed.is_cuda))
