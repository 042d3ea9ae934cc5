"""With a draft the engine says what it says without one, whatever the draft is worth and whatever else goes on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drafting import DRAFTS, Make, check, draft_model, finish, make_engine, prompts

from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.loader import convert
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.sequence import Sequence

NEW = 24
GREEDY = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)


def outputs(running: Engine, params: SamplingParams = GREEDY, count: int = 8, longest: int = 40) -> list[list[int]]:
    sequences = [running.add(prompt, params) for prompt in prompts(count, longest)]
    finish(running)
    return [sequence.output for sequence in sequences]


def written(running: Engine, tokens: list[int]) -> tuple[int, list[torch.Tensor]]:
    """Keys and values that a draft's or an engine's cache knows of a prefix, first to last."""
    found = running.pool.match(tokens)
    running.pool.release(found)
    return len(found), [cache[found].flatten(0, 1) for cache in (*running.keys, *running.values)]


@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in DRAFTS), ("mistral", "near"), ("gemma3", "compressed")]
)
def test_greedy_tokens_are_those_of_the_model_alone(
    tiny: Make, family: str, kind: str, cancelling: Callable[..., None]
) -> None:
    """Under chunked prefill, preemption, shared prefixes and cancellation."""
    alone = make_engine(tiny, family=family, blocks=200)
    wanted = outputs(alone, count=14)
    running = make_engine(tiny, kind, family)
    many = prompts(14)
    decoding, reading = (running.add(prompt, GREEDY) for prompt in (many[3], prompts(3, 80)[1][:40]))
    sequences = [running.add(prompt, GREEDY) for prompt in many[:4]]
    back = running.add(many[9], GREEDY)
    sequences += [running.add(prompt, GREEDY) for prompt in many[4:]]
    waiting = running.add(many[6], GREEDY)
    cancelling(running, {"waiting": waiting, "reading": reading, "decoding": decoding, "put back": back}, check)
    finish(running)
    assert [sequence.output for sequence in sequences] == wanted
    assert sum(sequence.preempted for sequence in sequences) > 0
    assert sum(sequence.cached for sequence in sequences) > 0
    assert decoding.output == wanted[3][: len(decoding.output)]
    assert back.output == wanted[9][: len(back.output)]
    tally = running.speculation
    assert tally is not None
    assert tally.checks > 10
    low, high = {"itself": (1, 1), "near": (0.3, 0.99), "compressed": (0.01, 0.99), "other": (0, 0.3)}[kind]
    assert low <= tally.acceptance <= high


def test_a_draft_that_is_right_saves_steps(tiny: Make) -> None:
    """A prompt's step, then five tokens a step."""
    running = make_engine(tiny, "itself", blocks=200)
    sequence = running.add(prompts(1)[0][:12], SamplingParams(max_tokens=21, temperature=0, ignore_eos=True))
    assert [sequence.fresh for _ in running.run()] == [1, 5, 5, 5, 5]
    tally = running.speculation
    assert tally is not None
    assert (tally.drafted, tally.accepted, tally.checks, tally.tokens_per_check) == (16, 16, 4, 5.0)


@pytest.mark.parametrize("kind", DRAFTS)
def test_known_blocks_hold_what_the_model_computes(tiny: Make, kind: str) -> None:
    """No rejected token's keys and values in a block that others may share, of the model or of the draft."""
    running = make_engine(tiny, kind, blocks=300)
    sequences = [running.add(prompt, GREEDY) for prompt in prompts(6)]
    finish(running)
    assert running.drafter is not None
    drafting = draft_model(tiny, "llama", kind)
    for holder, model in ((running, tiny("llama")), (running.drafter, drafting)):
        fresh = Engine(convert(model, 128), EngineConfig(blocks=300, block_size=4))
        for sequence in sequences:
            tokens = sequence.prompt + sequence.output
            fresh.add(tokens, SamplingParams(max_tokens=1, temperature=0))
            finish(fresh)
            count, found = written(holder, tokens)  # type: ignore[arg-type]
            assert count * 4 >= len(tokens) - 12
            for ours, theirs in zip(found, written(fresh, tokens)[1], strict=True):
                assert torch.allclose(ours, theirs[: len(ours)], atol=1e-4)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("kind", ["itself", "near"])
def test_an_output_ends_within_what_was_accepted(tiny: Make, kind: str, seed: int | None) -> None:
    """At the end of sequence, at a stop token, at its length and at the model's; what was guessed past that is gone."""
    prompt, drawn = prompts(1)[0], {"temperature": 0.0 if seed is None else 1.0, "seed": seed}
    plain, everything = make_engine(tiny), SamplingParams(max_tokens=NEW, ignore_eos=True, **drawn)  # type: ignore[arg-type]
    free = plain.add(prompt, everything)
    finish(plain)
    for place in (3, 5, 6, 9):
        token = free.output[place]
        options = {"eos": [token], "blocks": 64, "most_length": len(prompt) + place + 2, "most_tokens": 64}
        running = make_engine(tiny, kind, **options)
        more: Any = drawn | {"logprobs": 1}
        ends = [
            running.add(prompt, SamplingParams(max_tokens=NEW, **more)),
            running.add(prompt, SamplingParams(max_tokens=NEW, ignore_eos=True, stop_token_ids=[token], **more)),
            running.add(prompt, SamplingParams(max_tokens=place - 1, ignore_eos=True, **more)),
            running.add(prompt, SamplingParams(max_tokens=NEW, ignore_eos=True, **more)),
        ]
        finish(running)
        first = free.output.index(token) + 1
        lengths = [first, first, place - 1, place + 2]
        assert [end.output for end in ends] == [free.output[:length] for length in lengths]
        assert [len(end.logprobs) for end in ends] == lengths
        assert [end.finish_reason for end in ends] == ["stop", "stop", "length", "length"]


def test_a_draft_without_room_does_no_harm(tiny: Make) -> None:
    wanted, drafted = outputs(make_engine(tiny, blocks=200)), []
    for blocks in (1, 6, 30):
        running = make_engine(tiny, "near", draft_blocks=blocks)
        assert outputs(running) == wanted
        assert running.speculation is not None
        drafted.append(running.speculation.drafted)
    assert drafted[0] < drafted[1] < drafted[2]


def test_guesses_take_no_place_from_others(tiny: Make) -> None:
    """Blocks for guesses are free ones: as many sequences lose their place as without a draft."""
    lost = {}
    for kind in (None, "other"):
        running = make_engine(tiny, kind, blocks=20)
        sequences = [running.add(prompt, GREEDY) for prompt in prompts(6)]
        finish(running)
        lost[kind] = sum(sequence.preempted for sequence in sequences)
    assert lost[None] > 0
    assert lost["other"] <= lost[None]


def test_nothing_is_guessed_while_many_decode(tiny: Make) -> None:
    """It pauses and goes on, with sequences whose draft had been wrong before."""
    wanted = outputs(make_engine(tiny, blocks=300), count=6, longest=8)
    running = make_engine(tiny, "other", blocks=300, draft_most_sequences=2)
    added: list[Sequence] = []
    paused, drafted = 0, []
    for number, prompt in enumerate(prompts(6, 8)):
        added.append(running.add(prompt, GREEDY))
        for _ in range(3):
            before = running.speculation.drafted  # type: ignore[union-attr]
            many = sum(sequence.left == 1 for sequence in running.scheduler.running) > 2
            running.step()
            paused += many
            drafted.append(running.speculation.drafted - before)  # type: ignore[union-attr]
            assert not (many and drafted[-1]), number
    finish(running)
    assert paused
    assert sum(drafted)
    assert [sequence.output for sequence in added] == wanted


def test_a_prompt_that_the_draft_has_not_read_yet_does_not_wait(tiny: Make) -> None:
    """The draft reads 8 tokens a step; the sequence decodes meanwhile."""
    prompt = prompts(1, 60)[0][:40]
    running = make_engine(tiny, "itself", blocks=100, most_tokens=64, draft_most_tokens=8)
    sequence = running.add(prompt, GREEDY)
    assert [sequence.fresh for _ in running.run()][:8] == [1, 1, 1, 1, 1, 1, 5, 5]
    plain = make_engine(tiny, blocks=100)
    again = plain.add(prompt, GREEDY)
    finish(plain)
    assert sequence.output == again.output


@pytest.mark.parametrize("kind", ["near", "other"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.2, "seed": 6, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "logprobs": 2},
        {"temperature": 0.7, "seed": 7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 1.0, "logprobs": 3},
    ],
    ids=["seed", "filters", "penalties", "greedy penalties"],
)
def test_fixed_requests_get_the_tokens_that_they_get_without_a_draft(
    tiny: Make, kind: str, options: dict[str, Any]
) -> None:
    """Alone or in a crowd; log-probabilities too."""
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, **options)
    plain = make_engine(tiny)
    alone = plain.add(prompts(4)[3], params)
    finish(plain)
    for crowd in (0, 6):
        running = make_engine(tiny, kind, blocks=30 if crowd else 100)
        others = [running.add(prompt, SamplingParams(max_tokens=NEW)) for prompt in prompts(crowd)]
        same = running.add(prompts(4)[3], params)
        finish(running)
        assert same.output == alone.output
        assert running.speculation is not None
        assert running.speculation.accepted > 0 or kind == "other"
        assert all(other.finish_reason for other in others)
        for ours, theirs in zip(same.logprobs, alone.logprobs, strict=True):
            assert ours.chosen == pytest.approx(theirs.chosen, abs=1e-4)
            assert ours.top == pytest.approx(theirs.top, abs=1e-4)


def test_a_wrong_guess_costs_no_known_prefix(tiny: Make) -> None:
    """A cache that holds a prompt's prefix, and no more room than the next request needs, still holds it after that."""
    running = make_engine(tiny, "other", blocks=16, most_length=40)
    first = prompts(1)[0][:21]
    for params in (SamplingParams(max_tokens=2, temperature=0), SamplingParams(max_tokens=20, temperature=0)):
        running.add(first if params.max_tokens == 2 else prompts(2)[1][:4], params)
        finish(running)
    again = running.add(first, SamplingParams(max_tokens=1))
    finish(running)
    assert again.cached == 20
