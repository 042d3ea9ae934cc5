"""The command `rankwise serve`; what it does is in `rankwise.engine.doors.server`, or in vLLM."""

from typing import Annotated, Any

import typer

from rankwise.errors import RankwiseError
from rankwise.options import Device, Draft, DraftTokens, Dtype, Json, Model

PACKAGES = ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")
ENGINES = ("rankwise", "vllm")
VLLM_TAKES = {"host", "port", "name", "api_key", "max_sequences", "max_model_len", "prefix_caching", "dtype"}


def serve(
    context: typer.Context,
    model: Model,
    engine: Annotated[
        str, typer.Option(help="rankwise, or vllm: what follows -- is then handed to vLLM's server.")
    ] = "rankwise",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: MODEL.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="RANKWISE_API_KEY", help="What clients must send; default: nothing.")
    ] = None,
    max_sequences: Annotated[int, typer.Option(help="Sequences that run at once.")] = 64,
    max_queue: Annotated[int, typer.Option(help="Sequences that may wait beside them; more get 429.")] = 256,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output; default: the model's, at most 8192.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Output tokens that a client may ask for.")] = None,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body.")] = 1 << 20,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Tokens that the KV cache holds; default: what memory allows.")
    ] = None,
    prefix_caching: Annotated[bool, typer.Option(help="Prompts that begin alike share keys and values.")] = True,
    draft: Draft = None,
    draft_tokens: DraftTokens = 4,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take, waiting included.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds for requests in flight after SIGTERM or Ctrl-C.")] = 30.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Serve a model over HTTP as OpenAI's API does: completions, chat, streams. Needs the extra `serve`."""
    if engine not in ENGINES:
        raise RankwiseError("engine", engine, f"allowed: {', '.join(ENGINES)}")
    if engine == "vllm":
        _serve_by_vllm(context)
    if context.args:
        raise RankwiseError("argument", context.args[0], "options after -- are for --engine vllm")
    try:
        from rankwise.engine.doors.server import process
        from rankwise.engine.doors.server.config import ServeConfig
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in PACKAGES:
            raise
        raise RankwiseError("serve", f"no {error.name}", "needs the extra: pip install 'rankwise[serve]'") from None
    config = ServeConfig(
        model=model,
        host=host,
        port=port,
        name=name,
        api_key=api_key,
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_body=max_body,
        timeout=timeout,
        grace=grace,
        max_model_len=max_model_len,
        kv_tokens=kv_tokens,
        max_sequences=max_sequences,
        prefix_caching=prefix_caching,
        draft=draft,
        draft_tokens=draft_tokens,
        device=device,
        dtype=dtype,
    )
    process.serve(config, as_json)


def _serve_by_vllm(context: typer.Context) -> None:
    """Hand over to vLLM; never returns."""
    from rankwise.engine.doors.vllm.launch import launch

    for name in sorted(set(context.params) - VLLM_TAKES - {"model", "engine"}):
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = "--json" if name == "as_json" else f"--{name.replace('_', '-')}"
            allowed = "an option of rankwise's own engine; vLLM's own options go after --"
            raise RankwiseError(option, "given with --engine vllm", allowed)
    options: dict[str, Any] = {name: value for name, value in context.params.items() if name in VLLM_TAKES}
    launch(context.params["model"], options, context.args)
