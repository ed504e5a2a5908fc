"""serve(): one service on one home folder, from its start to a clean end."""

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from filelock import FileLock, Timeout

from labkit import paths
from labkit.errors import ServiceError
from labkit.service.app import BASE_NAME, create_app

LOOPBACK = ("127.0.0.1", "localhost", "::1")
GRACE_SECONDS = 2  # for replies under way when the service is told to end


def serve(
    host: str = "127.0.0.1",
    port: int = 0,
    home: Path | None = None,
    base: Path | None = None,
    base_name: str = BASE_NAME,
    idle_exit: float | None = None,
    warm: bool = True,
) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code 0.

    `port` 0 takes any free one. `home` defaults to `LABKIT_HOME`, `base` (a folder with a causal
    LM) to the course's base model, fetched if need be. With `idle_exit` the service ends after so
    many seconds without a request and without a job to do. Once ready it prints the lines to
    paste and writes `home/service.json`. Raises `ServiceError` when the home is being served
    already, or the port is taken.
    """
    home = (home or paths.home()).resolve()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ["LABKIT_HOME"] = str(home)  # the engine keeps what it measures of the machine there
    if base is None:
        from labkit import assets

        base = assets.base_model()
    with _only_service(home), _listening(host, port) as listener:
        app = create_app(home, base.resolve(), _key(home), base_name, warm=warm)
        _log_to_stderr()
        server = Server(app, home, listener, base_name, idle_exit)
        # uvicorn raises the signal again after its clean end, which would end this process before ours.
        previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        finally:
            (home / "service.json").unlink(missing_ok=True)
            for number, handler in previous.items():
                signal.signal(number, handler)
    return 0


class Server(uvicorn.Server):
    """uvicorn's server, which tells when it is ready, and ends when it was idle for long."""

    def __init__(self, app: FastAPI, home: Path, listener: socket.socket, base_name: str,
                 idle_exit: float | None) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                                        timeout_graceful_shutdown=GRACE_SECONDS))
        self.app, self.home, self.base_name, self.idle_exit = app, home, base_name, idle_exit
        host, self.port = listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say where."""
        await super().startup(sockets)
        paths.write_text(self.home / "service.json",
                         json.dumps({"pid": os.getpid(), "url": self.url, "port": self.port}))
        command = "set" if os.name == "nt" else "export"
        print(f"Serving {self.base_name} from {self.home}. Paste these lines into another terminal; Ctrl-C ends.\n"
              f"{command} OPENAI_BASE_URL={self.url}\n{command} OPENAI_API_KEY={_key(self.home)}", flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        idle = self.idle_exit is not None and self.app.state.activity.idle_seconds() > self.idle_exit
        if idle and counter % 10 == 0 and not await asyncio.to_thread(self.app.state.supervisor.busy):
            return True
        return await super().on_tick(counter)


@contextmanager
def _only_service(home: Path) -> Iterator[None]:
    """Hold the home's lock, which the system frees even when this process is killed."""
    lock = FileLock(home / "service.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ServiceError(f"{home} is being served already{_who(home)}. Use that service, end it first (labkit stop), "
                           "or set LABKIT_HOME to another folder.") from None
    try:
        yield
    finally:
        lock.release()


def _who(home: Path) -> str:
    try:
        other = json.loads((home / "service.json").read_text())
        return f" by process {other['pid']} at {other['url']}"
    except (OSError, ValueError, KeyError):
        return ""  # it is still starting


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens at the address, before anything costly is done."""
    if host not in LOOPBACK:
        raise ServiceError(f"The service answers on this machine only, not on {host}. Use --host 127.0.0.1, and an SSH "
                           "tunnel to reach it from elsewhere.")
    # The protocol by name: only then does asyncio switch off Nagle's algorithm, which holds up every reply by 40 ms.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "nt":
            listener.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE"), 1)  # noqa: B009
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except (OSError, OverflowError) as error:
            raise ServiceError(
                f"The service cannot listen on port {port} of {host} ({error}). Another program may use that port: "
                "choose another one with --port N, or --port 0 for any free one.") from error
        yield listener
    finally:
        listener.close()


def _key(home: Path) -> str:
    """The key of this home's service: made once, readable by its owner only."""
    path = home / "api_key"
    if not path.exists():
        paths.write_text(path, f"sk-local-{secrets.token_urlsafe(24)}\n", private=True)
    return path.read_text().strip()


def _log_to_stderr() -> None:
    """Structured lines of our own as they are; uvicorn's rare warnings beside them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("labkit.service")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
