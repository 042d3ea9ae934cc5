"""A process for each contestant, so that its memory is its own; it measures when it is asked to."""

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from rankwise.bench.config import BenchConfig, Contestant
from rankwise.errors import RankwiseError


class Worker:
    """The near end of a contestant's process. It loads and checks itself at once; `ready` waits for that.

    Args:
        contestant: who.
        config: what will be measured.
    """

    def __init__(self, contestant: Contestant, config: BenchConfig) -> None:
        self.contestant = contestant
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, contestant, config), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> dict[str, Any]:
        """Wait until it is loaded; device, dtype, vocabulary, footprint and so on.

        Raises:
            RankwiseError: it could not be loaded, or its numbers are wrong.
        """
        return self._answer()

    def ask(self, what: str, *arguments: Any) -> dict[str, Any]:
        """`batch` or `serve` with the arguments of `Runner`; token times in seconds, and peak bytes.

        Raises:
            RankwiseError: something is wrong with it, or it died.
        """
        try:
            self.pipe.send((what, arguments))
        except OSError:
            raise self._dead() from None
        return self._answer()

    def stop(self) -> None:
        """End it."""
        self.pipe.close()
        self.process.join(timeout=5)
        self.process.kill()
        self.process.join()

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise self._dead() from None
        if isinstance(answer, tuple):
            raise RankwiseError(*answer)
        return dict(answer)

    def _dead(self) -> RankwiseError:
        return RankwiseError("model", str(self.contestant), "its process died, most likely for want of memory")


def _work(pipe: Connection, contestant: Contestant, config: BenchConfig) -> None:
    from rankwise.bench.memory import peak, reset_peak
    from rankwise.bench.runners import load_runner
    from rankwise.zoo import quiet_transformers

    quiet_transformers()
    try:
        runner = load_runner(contestant, config)
        runner.gate()
        pipe.send(_facts(runner))
        while True:
            what, arguments = pipe.recv()
            reset_peak(runner.device)
            stamps = getattr(runner, what)(*arguments)
            pipe.send({"stamps": stamps, "peak": peak(runner.device)})
    except RankwiseError as error:
        pipe.send((error.field, error.value, error.allowed))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            pipe.send(("device", f"{contestant}: its memory is full", "fewer contestants or a smaller --batch"))
        elif contestant.engine == "rankwise":
            raise
        else:  # others may break in their own ways on a model or a device that does not suit them
            reason = f"{contestant} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            pipe.send(("engine", reason, "leave it out"))


def _facts(runner: Any) -> dict[str, Any]:
    import torch

    from rankwise.provenance import versions

    cuda = runner.device.type == "cuda"
    name = torch.cuda.get_device_name(runner.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    shared = {"vocabulary": runner.vocabulary, "footprint": runner.footprint}
    return {**shared, "device": name, "dtype": runner.dtype, "versions": versions()}
