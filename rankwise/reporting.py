"""What `rankwise report` does: models measured in the same way, one after another, and the page that shows them."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rankwise import bench as speed
from rankwise import console
from rankwise.benching import add_speed
from rankwise.commands import quality
from rankwise.config import check
from rankwise.engine.checkpoint import is_rankwise, open_checkpoint
from rankwise.errors import RankwiseError
from rankwise.jobs import is_unfinished
from rankwise.zoo import require_folder


def report(
    folder: Path,
    out: Path,
    against: str | None,
    beside: Sequence[str],
    text: str,
    windows: int,
    seq_len: int,
    with_speed: bool,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """`rankwise report`."""
    from rankwise.report import write_report

    check("out", str(out), not out.exists(), "a folder that does not exist yet")
    require_finished(str(folder))
    plan, _ = open_checkpoint(folder)
    original = against or plan.provenance.get("model")
    models = distinct([*([original] if original else []), str(folder), *beside])
    for model in models:
        require_there(model)
    rows = []
    for model in models:
        with telling(model):
            rows += quality([model], text, windows, seq_len, device, dtype)
    if with_speed:
        rows = add_speed(rows, speed.BenchConfig(device=device, dtype=dtype))
    made = [_place(model) for model in models].index(_place(str(folder)))
    page = write_report(plan, rows, out, title=folder.name, made=made)
    console.model_table(rows, rows[0]["text"])
    console.show(f"report: {page}")
    if as_json:
        console.print_json({"report": str(page), "rows": rows})


def distinct(models: Sequence[str]) -> list[str]:
    """Each model once, in the order given; a folder is the same under any path."""
    found: dict[str, str] = {}
    for model in models:
        found.setdefault(_place(model), model)
    return list(found.values())


def require_finished(model: str) -> None:
    """Raise a RankwiseError if a folder is not there because the compression that writes it was interrupted."""
    path = Path(model)
    if path.name and not path.exists() and is_unfinished(path):
        raise RankwiseError(
            "model", f"{model} (its compression was interrupted)", "the same `rankwise compress` goes on"
        )


def require_there(model: str) -> None:
    """Raise a RankwiseError, before minutes go into other models, if nothing complete is where a name points.

    Models of the hub, GGUF files and the embedded one are looked at when they are loaded.
    """
    require_finished(model)
    path = Path(model)
    if path.is_dir() and is_rankwise(path):
        open_checkpoint(path)
    elif not model.endswith(".gguf"):
        require_folder(model)


@contextmanager
def telling(model: str) -> Iterator[None]:
    """Whatever ends the measuring of a model says which one it was."""
    try:
        yield
    except RankwiseError as error:
        if re.search(rf"(?<!\w){re.escape(model)}(?!\w)", str(error)):
            raise
        raise RankwiseError(error.field, f"{error.value} ({model})", error.allowed) from error
    except KeyboardInterrupt:
        console.show(f"{model}: interrupted while it was measured; no page is written, all models are measured anew")
        raise
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        hint = "use --device cpu or a shorter --seq-len"
        raise RankwiseError("device", f"its memory is full ({model})", hint) from None


def _place(model: str) -> str:
    return os.path.realpath(model) if os.path.exists(model) else model
