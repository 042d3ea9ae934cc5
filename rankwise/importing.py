"""The command `rankwise import`; what it does is in `rankwise.imports`."""

from pathlib import Path
from typing import Annotated

import typer

from rankwise.options import Json


def import_(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub id, saved by transformers with bitsandbytes' nf4.")
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; must not exist.")],
    restart: Annotated[bool, typer.Option(help="Throw away unfinished work instead of continuing it.")] = False,
    as_json: Json = False,
) -> None:
    """Make a checkpoint of a model that bitsandbytes stored in nf4: the same codes. It need not be installed."""
    from rankwise import console
    from rankwise.engine.checkpoint import folder_bytes
    from rankwise.imports import import_folder
    from rankwise.progress import on_terminal

    plan = import_folder(model, out, restart=restart, track=on_terminal)
    layers = sum(spec.quantised for _, spec in plan)
    size = folder_bytes(out)
    console.show(f"{out}: {layers} of {len(plan.layers)} linear layers in nf4, {size / 1e6:.1f} MB")
    if as_json:
        console.print_json({"out": str(out), "ratio": plan.ratio, "bits": plan.bits, "bytes": size, "nf4": layers})
