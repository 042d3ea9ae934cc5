"""Speed: prefill and decode latency of several models, interleaved in one run.

Each model lives in a process of its own, so that its peak memory is its own; the processes take turns, round by
round, so that a machine that drifts treats all alike. Generation is transformers' own forward with its KV cache.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rankwise.config import check_count
from rankwise.errors import RankwiseError
from rankwise.progress import Track, silent

CACHE_ERROR = 0.05  # largest relative difference of logits with and without the KV cache that passes the gate


@dataclass(frozen=True)
class BenchConfig:
    """What is timed.

    Args:
        prompt: tokens of the prompt.
        new_tokens: decode steps timed a round.
        batch: sequences side by side.
        rounds: rounds a model; one more, first, is not counted.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: as in `load_model`.
    """

    prompt: int = 128
    new_tokens: int = 32
    batch: int = 1
    rounds: int = 5
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("prompt", "new_tokens", "batch", "rounds"):
            check_count(name, getattr(self, name), 1)


def bench(models: Sequence[str], config: BenchConfig, *, track: Track = silent) -> list[dict[str, Any]]:
    """Time models against each other.

    Args:
        models: names or folders, see `load_model`.
        config: what is timed.

    Returns:
        A row a model: times in ms (p50, p95), decode tokens a second over the whole batch, peak bytes of the process
        (of the GPU's allocator on CUDA) while it generated, bytes on disk, device and versions.

    Raises:
        RankwiseError: a model cannot be loaded, or its logits fail the check that precedes the timing.
    """
    workers = []
    try:
        for name in models:
            workers.append(_Worker(name, config))
        samples: list[list[dict[str, Any]]] = [[] for _ in workers]
        with track("timing", len(workers) * (config.rounds + 1)) as advance:
            for number in range(config.rounds + 1):
                for worker, kept in zip(workers, samples, strict=True):
                    measured = worker.ask("round")
                    if number:
                        kept.append(measured)
                    advance()
        return [_row(w, kept, config) for w, kept in zip(workers, samples, strict=True)]
    finally:
        for worker in workers:
            worker.stop()


def _row(worker: "_Worker", samples: list[dict[str, Any]], config: BenchConfig) -> dict[str, Any]:
    prefill = [1000 * sample["prefill"] for sample in samples]
    steps = [1000 * step for sample in samples for step in sample["steps"]]
    return {
        "name": worker.name,
        "prefill_ms_p50": percentile(prefill, 50),
        "prefill_ms_p95": percentile(prefill, 95),
        "decode_ms_p50": percentile(steps, 50),
        "decode_ms_p95": percentile(steps, 95),
        "tokens_per_s": config.batch * len(steps) / (sum(steps) / 1000),
        **worker.ask("facts"),
        **{key: value for key, value in asdict(config).items() if key not in ("device", "dtype")},
    }


def percentile(values: Sequence[float], share: int) -> float:
    """The given percentile, linearly interpolated; of one value, that value."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


class _Worker:
    """A process that holds one model and measures on demand."""

    def __init__(self, name: str, config: BenchConfig) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, config), daemon=True)
        self.process.start()
        theirs.close()
        self.ask(None)

    def ask(self, what: str | None) -> Any:
        try:
            if what:
                self.pipe.send(what)
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise RankwiseError("model", self.name, "its process died, most likely for want of memory") from None
        if isinstance(answer, tuple):
            raise RankwiseError(*answer)
        return answer

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(timeout=5)
        self.process.kill()


def _serve(pipe: Connection, name: str, config: BenchConfig) -> None:
    from rankwise.zoo import quiet_transformers

    quiet_transformers()
    try:
        runner = _Runner(name, config)
        pipe.send("ready")
        while True:
            pipe.send(runner.facts() if pipe.recv() == "facts" else runner.round())
    except RankwiseError as error:
        pipe.send((error.field, error.value, error.allowed))
    except (EOFError, BrokenPipeError):
        return


class _Runner:
    def __init__(self, name: str, config: BenchConfig) -> None:
        import torch

        from rankwise.anatomy import require_context
        from rankwise.zoo import load_model, model_dtype, resolve_device

        self.name, self.config, self.device = name, config, resolve_device(config.device)
        model, tokenizer = load_model(name, config.dtype, config.device)
        require_context(model, config.prompt + config.new_tokens, "prompt and new_tokens")
        self.model, self.dtype = model, model_dtype(model)
        generator = torch.Generator().manual_seed(0)
        shape = (config.batch, config.prompt)
        vocabulary = min(len(tokenizer), getattr(model.config, "vocab_size", len(tokenizer)))
        self.prompt = torch.randint(vocabulary, shape, generator=generator).to(self.device)
        with torch.inference_mode():
            self._gate()
        _reset_peak(self.device)

    def _gate(self) -> None:
        """Logits are finite, and the same with and without the KV cache."""
        import torch

        last = self.prompt[:, :1]
        cached = self.model(input_ids=self.prompt, use_cache=True)
        step = self.model(input_ids=last, past_key_values=cached.past_key_values, use_cache=True)
        full = self.model(input_ids=torch.cat([self.prompt, last], dim=1), use_cache=False).logits[:, -1].float()
        error = float((step.logits[:, -1].float() - full).norm() / full.norm())
        if not error < CACHE_ERROR:
            raise RankwiseError(
                "model", f"{self.name}: logits with and without KV cache differ by {error:.2g}", "no timing"
            )

    def round(self) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            start = self._now()
            out = self.model(input_ids=self.prompt, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            marks = [self._now()]
            for _ in range(self.config.new_tokens):
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
                marks.append(self._now())
        steps = [b - a for a, b in pairwise(marks)]
        return {"prefill": marks[0] - start, "steps": steps}

    def facts(self) -> dict[str, Any]:
        import torch

        from rankwise.provenance import versions
        from rankwise.zoo import disk_bytes

        cuda = self.device.type == "cuda"
        return {
            "weight_bytes": disk_bytes(self.name, self.config.dtype),
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else _peak_rss(),
            "device": torch.cuda.get_device_name(self.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
            "dtype": self.dtype,
            "versions": versions(),
        }

    def _now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _reset_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:  # Linux: forget the peak that loading reached
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_rss() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
