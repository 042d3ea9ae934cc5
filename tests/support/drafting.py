"""Engines with drafts of any worth, and what must hold of them between steps and at the end."""

import random
from collections.abc import Callable
from typing import Any

import torch

import rankwise
from rankwise.engine.runtime.blocks import BlockPool
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.loader import convert
from rankwise.engine.runtime.speculative import Drafter

DRAFTS = ["itself", "near", "compressed", "other"]
WINDOWS = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))
Make = Callable[..., Any]


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    """Random ids of random lengths, some of which begin alike."""
    rng = random.Random(0)
    common = [rng.randrange(2, 500) for _ in range(longest // 2)]
    made = [[rng.randrange(2, 500) for _ in range(rng.randrange(1, longest))] for _ in range(count)]
    return [common + prompt[: longest // 2] if at % 3 == 0 else prompt for at, prompt in enumerate(made)]


def draft_model(tiny: Make, family: str, kind: str) -> Any:
    """From one that is always right to one that hardly ever is."""
    if kind == "other":
        return tiny(family, seed=1)
    model = tiny(family)
    if kind == "near":
        torch.manual_seed(2)
        for parameter in model.parameters():
            parameter.add_(0.03 * parameter.std(correction=0) * torch.randn_like(parameter))
    if kind == "compressed":
        rankwise.compress(model, rankwise.allocate(model, WINDOWS, rankwise.Global(ratio=0.9, rank_multiple=1)))
    return model


def make_engine(tiny: Make, kind: str | None = None, family: str = "llama", **options: Any) -> Engine:
    """Small blocks, small steps, room for a few sequences: everything that can happen does.

    `draft_*` options are the drafter's, `eos` the engine's, the others of its config.
    """
    own = {key: options.pop(key) for key in [*options] if key.startswith("draft_")}
    eos = options.pop("eos", ())
    config = EngineConfig(**({"blocks": 30, "block_size": 4, "most_tokens": 16, "most_length": 80} | options))
    if kind is None:
        return Engine(convert(tiny(family), 128), config, eos)
    pool = BlockPool(own.pop("draft_blocks", config.blocks), config.block_size, share=config.share)
    limits = {"tokens": 4, "most_tokens": config.most_tokens} | {k[len("draft_") :]: v for k, v in own.items()}
    drafter = Drafter(convert(draft_model(tiny, family, kind), 128), pool, **limits)
    return Engine(convert(tiny(family), 128), config, eos, drafter)


def finish(running: Engine) -> None:
    """Run to the end, by which nothing may be held."""
    for _ in running.run():
        check(running)
    for pool in pools(running):
        assert pool.available() == pool.count
        assert not any(pool.holders)
    assert running.drafter is None or not running.drafter.shadows


def pools(running: Engine) -> list[BlockPool]:
    return [running.pool, *([running.drafter.pool] if running.drafter else [])]


def check(running: Engine) -> None:
    """Between steps no guess is left, and no sequence holds more than it has computed."""
    for sequence in running.scheduler.running:
        assert not sequence.draft
        assert not sequence.odds
        assert len(sequence.blocks) == -(-sequence.computed // running.pool.size)
        assert sequence.known <= sequence.computed // running.pool.size
    for sequence, shadow in running.drafter.shadows.items() if running.drafter else ():
        assert shadow.computed <= sequence.length - 1
        assert shadow.known <= shadow.computed // running.pool.size
