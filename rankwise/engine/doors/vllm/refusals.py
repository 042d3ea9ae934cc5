"""vLLM's server, in whose last line a user reads why a checkpoint was refused, whichever of its processes refused it.

    python -m rankwise.engine.doors.vllm.refusals --model small

vLLM prints a traceback for each process that fails, and none of them ends with the reason. What the others log is noted
in a file that this one reads when the server has not come up.
"""

import logging
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from rankwise.engine.doors.vllm import METHOD
from rankwise.errors import RankwiseError

SERVER = "vllm.entrypoints.openai.api_server"
NOTE = "RANKWISE_VLLM_REFUSAL"  # the file's name, for vLLM's other processes
UNREGISTERED = f"Unknown quantization method: {METHOD}"
UNSUPPORTED = "are not supported for now"


def main() -> None:
    """Run vLLM's server with this process's arguments; its errors stay as they are, one of ours is said once more."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[NOTE] = str(Path(folder) / "refusal")
        try:
            runpy.run_module(SERVER, run_name="__main__", alter_sys=True)
        except Exception as error:
            reason = noted() or reason_of(error)
            if reason is None:
                raise
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.write(f"error: {reason}\n")
            sys.exit(1)


def note_refusals() -> None:
    """In a process of vLLM's: write down the first refusal that it logs, if anybody will read it."""
    logger = logging.getLogger("vllm")
    if NOTE in os.environ and not any(isinstance(handler, _Note) for handler in logger.handlers):
        logger.addHandler(_Note())


class _Note(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        path = Path(os.environ[NOTE])
        errors = chain(record.exc_info[1]) if record.exc_info else ()
        reason = next((error for error in errors if isinstance(error, RankwiseError)), None)
        if reason is not None and path.parent.is_dir() and not path.exists():
            path.write_text(str(reason), encoding="utf-8")


def noted() -> str | None:
    """What another process wrote down."""
    path = Path(os.environ[NOTE])
    return path.read_text(encoding="utf-8") if path.is_file() else None


def reason_of(error: BaseException) -> str | None:
    """Why vLLM refused a model, as one line: our own words, those for what only we can mend, or vLLM's."""
    errors = list(chain(error))
    for one in errors:
        if isinstance(one, RankwiseError):
            return str(one)
        if UNREGISTERED in str(one):
            allowed = "install rankwise in vLLM's environment; VLLM_PLUGINS, if set, must name it"
            return str(RankwiseError("plugin", f"{METHOD} (vLLM did not load it)", allowed))
        if UNSUPPORTED in str(one):
            what = " ".join(str(one).split(UNSUPPORTED)[0].split()).rpartition("Model ")[2]
            return str(RankwiseError("model", f"{what} (vLLM has no such model)", "serve it with --engine rankwise"))
    plain = [one for one in errors if type(one) is ValueError]
    return f"vLLM: {' '.join(str(plain[-1]).split())}" if plain else None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised for, and what pydantic made it of."""
    while error is not None:
        yield error
        entries = getattr(error, "errors", tuple)
        for entry in entries() if callable(entries) else ():
            inner = entry.get("ctx", {}).get("error")
            if isinstance(inner, BaseException):
                yield inner
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    main()
