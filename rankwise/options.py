"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or embedded:smollm2-135m.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder written by `rankwise compress`.")]
Against = Annotated[str | None, typer.Option(help="A second model to set beside it, usually the original.")]
Draft = Annotated[str | None, typer.Option(help="A model that guesses ahead, usually MODEL compressed: same output.")]
DraftTokens = Annotated[int, typer.Option(help="Tokens that the draft guesses in a step.")]
Text = Annotated[str, typer.Option(help="Text to evaluate on: .txt, .jsonl, embedded:python-docs-test, wikitext2, c4.")]
Windows = Annotated[int, typer.Option(help="Windows of text, from its start.")]
SeqLen = Annotated[int, typer.Option(help="Tokens a window.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), bf16, fp16 or fp32.")]
Seed = Annotated[int, typer.Option(help="Fixes everything drawn at random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the only line of stdout.")]
