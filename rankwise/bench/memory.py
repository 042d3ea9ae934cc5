"""Bytes: what weights and keys take, what a step reads, how fast memory is, how much a process took."""

import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.engine.runtime.decoder import Decoder, Rotary
from rankwise.engine.runtime.loader import layer_kv_bytes, layer_windows
from rankwise.kernels import Packed
from rankwise.kernels.native_linear import HostGroup

PROBE = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes; larger than caches
REPEATS = 3


@dataclass(frozen=True)
class Footprint:
    """What a contestant holds and reads.

    Args:
        weights: bytes in memory.
        step: bytes of weights that a decode step reads: all but the table of input embeddings, of which it reads a row
            a sequence; where the head is that same table, it is read.
        token: bytes of a token's keys and values in one layer.
        windows: per layer, how many tokens back it looks; None: all.
    """

    weights: int
    step: int
    token: int
    windows: list[int | None]

    def kv_bytes(self, context: int) -> int:
        """Keys and values of a sequence of so many tokens."""
        return self.token * sum(context if window is None else min(context, window) for window in self.windows)


def footprint(config: Any, weights: int, step: int, dtype: torch.dtype) -> Footprint:
    """The footprint of a model by its transformers configuration; the keys are stored in `dtype`."""
    text = config.get_text_config()
    return Footprint(weights, step, layer_kv_bytes(text, dtype), layer_windows(text))


def of_model(model: Any) -> tuple[int, int]:
    """Bytes of a transformers model's weights, and of those that a decode step reads."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]  # of bitsandbytes
    scales = [state.absmax for state in states if state is not None]
    weights = tensor_bytes([*model.parameters(), *model.buffers(), *scales])
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return weights, weights if head is embed else weights - embed.nbytes


def of_decoder(decoder: Decoder) -> tuple[int, int]:
    """The same of the runtime's decoder, as its weights lie in memory."""
    step = tensor_bytes(tensors_in((decoder.blocks, decoder.norm, decoder.head)))
    head, embed = decoder.head, decoder.embed
    held = tensor_bytes(tensors_in((decoder.blocks, decoder.norm, head, decoder.coded)))
    tied = isinstance(head, torch.Tensor) and not head.is_mkldnn and head.data_ptr() == embed.data_ptr()
    return held if tied else held + embed.nbytes, step


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors of nested dataclasses and tuples; of a group those that are read, and no tables of angles."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Packed):  # `second` and `seconds` are the same
        yield from tensors_in((value.first, value.seconds, value.bias))
    elif isinstance(value, HostGroup):
        for part in (*value.firsts, *value.seconds):
            yield from tensors_in((part.panels.weights, part.panels.scales, part.bias))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value) and not isinstance(value, Rotary):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; those that are the same count once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def bandwidth(device: torch.device) -> float:
    """Bytes a second that memory gives: the faster of reading (a sum) and copying, each the median of a few.

    It takes twice `PROBE` of memory for a moment.
    """
    size = PROBE[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    reading = _seconds(source.sum, device)
    copying = _seconds(lambda: target.copy_(source), device)
    return max(size / reading, 2 * size / copying)


def _seconds(work: Any, device: torch.device) -> float:
    taken = []
    for _ in range(REPEATS + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the largest use of memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:  # Linux
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak(device: torch.device) -> int:
    """Largest use since `reset_peak`: of the GPU's allocator, or this process's resident memory, its code included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
