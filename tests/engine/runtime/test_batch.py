"""A step's tensors: padding on a CPU changes no token, and keeps the number of shapes small."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rankwise.engine.runtime import batch as layout
from rankwise.engine.runtime.batch import ALIGN, Batch, make_batch, placed
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.loader import convert
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.scheduler import Share
from rankwise.engine.runtime.sequence import Sequence

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def share(count: int, computed: int = 0) -> Share:
    sequence = Sequence(list(range(100, 100 + computed + count)), GREEDY)
    sequence.computed, sequence.blocks = computed, [3, 1, 4, 0, 5, 9, 2, 6]
    return Share(sequence, count)


def test_padding_comes_last_and_writes_nowhere() -> None:
    batch = make_batch([share(1, 6), share(25), share(4, 3)], 4, CPU)
    assert batch.ids.tolist() == [106, *range(100, 125), *range(103, 107), 0, 0]
    assert batch.positions.tolist() == [6, *range(25), *range(3, 7), 0, 0]
    assert batch.slots.tolist()[:1] == [1 * 4 + 2]
    assert batch.slots.tolist()[-2:] == [-1, -1]
    assert batch.bounds.tolist() == [0, 1, 26, 30]
    assert batch.contexts.tolist() == [7, 25, 7]
    assert batch.last.tolist() == [0, 25, 29]
    assert [bounds.tolist() for bounds in batch.several[1:]] == [[0, 25, 29], [25, 7]]


def test_all_lists_come_in_one_copy() -> None:
    wide, narrow = [[2**31 - 1, 7, 0], []], [[-1, 5], list(range(17)), [3]]
    found = placed(wide, narrow, CPU)
    assert [tensor.tolist() for tensor in found] == [*wide, *narrow]
    assert [tensor.dtype for tensor in found] == 2 * [torch.int64] + 3 * [torch.int32]
    assert {tensor.untyped_storage().data_ptr() for tensor in found} == {found[0].untyped_storage().data_ptr()}
    assert all(tensor.storage_offset() * tensor.itemsize % ALIGN == 0 for tensor in found)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_long_prompts_on_a_cpu_are_padded(device: str) -> None:
    assert len(make_batch([share(1, 6), share(1, 2)], 4, torch.device(device)).ids) == 2
    assert len(make_batch([share(5)], 4, torch.device(device)).ids) == 5  # no more shapes than decoding has
    assert len(make_batch([share(17)], 4, torch.device(device)).ids) == (32 if device == "cpu" else 17)
    assert len(make_batch([share(16)], 4, torch.device(device)).ids) == 16


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_padding_changes_no_token(tiny: Callable[..., Any], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(2, 500) for _ in range(rng.randrange(1, 40))] for _ in range(9)]
    outputs, sizes = [], []
    for multiple in (1, 16, 7):
        monkeypatch.setattr(layout, "HOST_MULTIPLE", multiple)
        running = Engine(convert(tiny(family), 128), EngineConfig(60, 4, most_tokens=23, most_length=80))
        met, forward = set(), running.forward

        def noting(batch: Batch, met: set[int] = met, forward: Any = forward) -> torch.Tensor:
            met.add(len(batch.ids))
            return forward(batch)

        running.forward = noting
        sequences = [running.add(prompt, GREEDY) for prompt in prompts]
        for _ in running.run():
            pass
        outputs.append([sequence.output for sequence in sequences])
        sizes.append(met)
    assert outputs[0] == outputs[1] == outputs[2]
    assert sizes[1] - set(range(16)) <= {16, 32}
    assert sizes[0] - set(range(16)) - {16, 32}  # without it there are others
