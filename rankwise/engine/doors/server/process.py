"""`rankwise serve`: a socket, a model, and an orderly end."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from rankwise import console
from rankwise.engine.doors.server.app import Door
from rankwise.engine.doors.server.config import ServeConfig
from rankwise.engine.doors.server.faults import unavailable
from rankwise.engine.runtime.llm import LLM
from rankwise.errors import RankwiseError
from rankwise.zoo import quiet_transformers

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CLOSING = 5  # seconds for connections to close when the work is done


class Server(uvicorn.Server):
    """uvicorn's, but signals are handled here, and somebody is told when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets=sockets)
        self.on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


def serve(config: ServeConfig, as_json: bool) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        config: what, where, how much.
        as_json: one JSON object on stdout when it listens: `url`, `model`, `context`, `kv_tokens`.

    Raises:
        RankwiseError: the address cannot be had, or the model cannot be loaded.
    """
    quiet_transformers()
    listener = bind(config.host, config.port)
    with listener:
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        llm = LLM(
            config.model,
            dtype=config.dtype,
            device=config.device,
            max_model_len=config.max_model_len,
            kv_tokens=config.kv_tokens,
            max_sequences=config.max_sequences,
            prefix_caching=config.prefix_caching,
            draft=config.draft,
            draft_tokens=config.draft_tokens,
        )
        door = Door(llm, config)

        def ready() -> None:
            console.show(f"{llm.plan}, {config.max_sequences} sequences at once")
            console.show(f"{config.served_name}: {url}/v1" + ("" if config.api_key else ", open to whoever reaches it"))
            if as_json:
                facts = {"context": llm.engine.scheduler.most_length, "kv_tokens": llm.plan.tokens}
                console.print_json({"url": url, "model": config.served_name, **facts})

        asyncio.run(run(door, listener, ready))
    console.show("stopped")


def bind(host: str, port: int) -> socket.socket:
    """Take an address; nothing listens there yet, so that clients are refused and not kept waiting.

    Raises:
        RankwiseError: it is taken, or not this machine's.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        if listener is not None:
            listener.close()
        raise RankwiseError("host and port", f"{host}:{port} ({error.strerror})", "a free address is needed") from None


async def run(door: Door, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve on a bound socket until a signal, then let accepted requests end; a second signal ends them."""
    options = {"http": "h11", "ws": "none", "lifespan": "on", "log_config": None, "access_log": False}
    network = {"proxy_headers": False, "server_header": False, "timeout_graceful_shutdown": CLOSING}
    server = Server(uvicorn.Config(door, **options, **network), on_ready)  # type: ignore[arg-type]
    signalled = asyncio.Event()
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, signalled.set)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    waiting = asyncio.create_task(signalled.wait())
    await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        await drain(door, signalled)
    waiting.cancel()
    server.should_exit = True
    await serving


async def drain(door: Door, signalled: asyncio.Event) -> None:
    """Take no more requests; wait for those in flight, but not beyond the grace period or another signal."""
    door.guard.draining = True
    signalled.clear()
    console.show(f"shutting down: {door.guard.open} requests in flight, {door.config.grace:g} s for them")
    events = [asyncio.create_task(event.wait()) for event in (door.guard.idle, signalled)]
    await asyncio.wait(events, timeout=door.config.grace, return_when=asyncio.FIRST_COMPLETED)
    for event in events:
        event.cancel()
    door.loop.abort(unavailable("the server is shutting down", "shutting_down"))
