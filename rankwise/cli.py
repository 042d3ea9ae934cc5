"""The command line. Every command imports its work when it runs, so that `--help` answers at once."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise import benching, importing, serving
from rankwise.distributed import tell
from rankwise.errors import RankwiseError
from rankwise.options import Against, Checkpoint, Device, Draft, Dtype, Json, Model, Seed, SeqLen, Text, Windows

app = typer.Typer(
    name="rankwise",
    help="Compress a language model by SVD with ranks chosen under a budget, and run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

INTERRUPTED = 130  # typer's exit code for Ctrl-C
TEST_TEXT = "embedded:python-docs-test"
TEST_LEN = 512  # the embedded test text holds 16 windows of this length


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; must not exist.")],
    ratio: Annotated[
        float | None, typer.Option(help="Share of the linear layers' parameters to keep; default: 0.8.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="In place of --ratio: bytes of all weight files, e.g. 5GB, 300MiB.")
    ] = None,
    bits: Annotated[
        float | None, typer.Option("--bits-per-weight", help="Or bits for each number of the linear layers.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `rankwise methods`; default: rankwise.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the method; repeatable.")
    ] = None,
    kinds: Annotated[
        str | None, typer.Option(help="What a layer may become: some of dense,lowrank,pivot; default: the method's.")
    ] = None,
    sides: Annotated[
        str | None, typer.Option(help="Metric of the factors: one, two or diagonal; default: the method's.")
    ] = None,
    rank_multiple: Annotated[int, typer.Option(help="Ranks are multiples of this.")] = 8,
    weights: Annotated[
        str,
        typer.Option(
            help="How layers are stored: bf16, fp16, fp32, nf4, int4, int8; auto: the model's dtype. With a budget of "
            "bytes: what to choose from, joined by commas; auto: the model's dtype, nf4, int4, int8."
        ),
    ] = "auto",
    group: Annotated[int | None, typer.Option(help="Of int4: columns that share a scale; 32, 64, 128.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Of int4: a zero point for every group.")] = False,
    rounding: Annotated[
        str | None, typer.Option(help="To 4 or 8 bits: feedback (by the curvature) or nearest; default: feedback.")
    ] = None,
    candidates: Annotated[
        int, typer.Option(help="Of a budget of bytes: plans to carry out and judge on text; 1: trust the prediction.")
    ] = 3,
    embeddings: Annotated[
        str | None, typer.Option(help="Store the embedding table and the head in this: int8; default: as they are.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Layers to leave as they are: *.down_proj; repeatable.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest relative miss of the budget.")] = 0.001,
    calibration: Annotated[
        str, typer.Option(help="Text: .txt, .jsonl, embedded:python-docs, wikitext2, c4.")
    ] = "embedded:python-docs",
    samples: Annotated[int, typer.Option(help="Windows for the second moments of inputs.")] = 64,
    gradient_samples: Annotated[int, typer.Option(help="Windows for output gradients.")] = 16,
    measure: Annotated[int, typer.Option(help="Held-out windows for perplexity before and after; 0: none.")] = 4,
    learn: Annotated[str | None, typer.Option(help="Text to train, refit, heal on; default: --samples.")] = None,
    learn_samples: Annotated[int, typer.Option(help="Windows of --learn; 0: all, up to 256.")] = 0,
    refit: Annotated[
        bool | None, typer.Option(help="Solve the factors again for the compressed model's inputs.")
    ] = None,
    heal: Annotated[int, typer.Option(metavar="STEPS", help="Distil the kept factors from the dense model.")] = 0,
    score_only: Annotated[
        bool, typer.Option("--score-only", help="Write spectra, what was learnt and factors; no checkpoint.")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option("--from", metavar="SCORES", help="Plan by the method of such a folder, without text.")
    ] = None,
    seq_len: SeqLen = 1024,
    shuffle: Annotated[bool, typer.Option(help="Draw the windows from all over the text, as --seed says.")] = False,
    curvature: Annotated[Path | None, typer.Option(help="Folder of second moments to reuse, or to fill.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Carry out this plan.json; --ratio, --method, --kinds are not used then.")
    ] = None,
    restart: Annotated[bool, typer.Option(help="Throw away unfinished work instead of continuing it.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose ranks under a budget and write a smaller checkpoint. Interrupted, the same command continues.

    Several processes share the work under torchrun: torchrun --nproc-per-node N -m rankwise compress ...
    """
    from rankwise import commands
    from rankwise.alloc.options import make_method
    from rankwise.budgets import make_budget
    from rankwise.config import CompressConfig, TextConfig, check
    from rankwise.weights import make_precision

    budget = make_budget(size, bits, weights, group, asymmetric)
    precision = None if budget else make_precision(weights, group, asymmetric)
    check("ratio", ratio, ratio is None or budget is None, "left out with --size and --bits-per-weight")
    if scores:
        decided = {"method": method, "set": options, "kinds": kinds, "sides": sides, "keep": keep}
        for name, value in decided.items():
            check(name, value, value is None, "left out: with --from, the scores' own method plans")
    if kinds is None and precision is not None and precision.quantised:
        kinds = "dense,lowrank"  # coefficients of pivot layers round badly
    shared = {"kinds": kinds, "rank_multiple": rank_multiple, "tolerance": tolerance, "sides": sides}
    made = make_method(method or "rankwise", 0.8 if ratio is None else ratio, shared | {"keep": keep}, options or [])
    text = TextConfig(calibration, samples, gradient_samples, seq_len, measure, shuffle, seed, learn, learn_samples)
    work = device, dtype, curvature, plan, restart, refit, heal, score_only, scores, precision, budget
    config = CompressConfig(model, out, made, text, *work, rounding, candidates, embeddings)
    commands.compress(config, as_json)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the allocation methods and the options that `--set` takes."""
    from rankwise import commands

    commands.methods(as_json)


@app.command()
def inspect(
    checkpoint: Checkpoint,
    verify: Annotated[bool, typer.Option("--verify", help="Also compare the SHA-256 of every file.")] = False,
    as_json: Json = False,
) -> None:
    """List kind, rank, parameters and bytes of every module; check shapes against the plan."""
    from rankwise import commands

    commands.inspect(checkpoint, verify, as_json)


@app.command(name="eval")
def evaluate(
    model: Model,
    against: Against = None,
    text: Text = TEST_TEXT,
    windows: Windows = 16,
    seq_len: SeqLen = TEST_LEN,
    tasks: Annotated[str | None, typer.Option(help="Accuracy on these too, by lm-eval: arc_easy,piqa,…")] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="Questions from files in here, not from the hub.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions a task, from its start; default: all.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity and accuracy, of one model or of two side by side."""
    from rankwise import commands

    models = [model, *([against] if against else [])]
    commands.evaluate(models, text, windows, seq_len, (tasks, tasks_folder, limit), device, dtype, as_json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    draft: Draft = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output; default: the model's, at most 8192.", min=2)
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, printing tokens as they come."""
    from rankwise import commands

    where = draft, device, dtype, seed, max_model_len
    commands.generate(model, prompt, max_tokens, temperature, top_p, chat, *where, as_json)


app.command()(benching.bench)
app.command(context_settings={"allow_extra_args": True})(serving.serve)
app.command(name="import")(importing.import_)


@app.command()
def report(
    checkpoint: Checkpoint,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: CHECKPOINT-report.")] = None,
    against: Against = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="A further model for the table and the figures; repeatable.")
    ] = None,
    text: Text = TEST_TEXT,
    windows: Windows = 16,
    seq_len: SeqLen = TEST_LEN,
    speed: Annotated[bool, typer.Option(help="Measure speed and memory too.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Write one HTML page: rank map, kept energy, perplexity, size, speed. Default --against: the original."""
    from rankwise import reporting

    folder = out or checkpoint.with_name(f"{checkpoint.name}-report")
    reporting.report(checkpoint, folder, against, beside or (), text, windows, seq_len, speed, device, dtype, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and report; must not exist.")] = Path("demo"),
    ratio: Annotated[float, typer.Option(help="Share of the linear layers' parameters to keep.")] = 0.8,
    as_json: Json = False,
) -> None:
    """Compress the embedded SmolLM2-135M, measure it against the original, write a report. No network."""
    from rankwise import commands

    commands.demo(out, ratio, as_json)


def version(show: bool) -> None:
    """Print the version and leave."""
    if show:
        from rankwise import __version__

        typer.echo(f"rankwise {__version__}")
        raise typer.Exit


@app.callback()
def root(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that every command has."""


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; the console script's entry. Bad input is one line on stderr and exit code 2."""
    try:
        return app(arguments)
    except RankwiseError as error:
        tell(f"error: {error}\n")
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported here
            raise
        sys.stderr.write("error: device: its memory is full; use --device cpu, fewer rounds or a shorter --seq-len\n")
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"error: {error.filename}: {error.strerror}; a path that can be read and written is needed\n")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            sys.stderr.write("interrupted; the same command continues where this one stopped\n")
        raise


if __name__ == "__main__":
    main()
