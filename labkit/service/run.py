"""serve(): one service on one home folder, from its start to a clean end."""

import asyncio
import json
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI
from filelock import FileLock, Timeout

from labkit import paths
from labkit.errors import ServiceError
from labkit.service import keys
from labkit.service.app import BASE_NAME, LOCAL_NAMES, create_app

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ALL_ADDRESSES = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # with the one by which this machine reaches itself
GRACE_SECONDS = 2  # for replies under way when the service is told to end


def serve(
    host: str = "127.0.0.1",
    port: int = 0,
    home: Path | None = None,
    base: Path | None = None,
    base_name: str = BASE_NAME,
    idle_exit: float | None = None,
    warm: bool = True,
    tls: tuple[Path, Path] | None = None,
    insecure: bool = False,
    names: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> NoReturn:
    """Serve until SIGTERM or Ctrl-C, then end the process with exit code 0.

    `port` 0 takes any free one. `home` defaults to `LABKIT_HOME`, `base` (a folder with a causal
    LM) to the course's base model, fetched if need be. With `idle_exit` the service ends after so
    many seconds without a request and without a job to do. Another `host` than this machine's own
    needs `tls` (the files of a certificate and its key, as PEM) or the consent `insecure`; `names`
    are more names that clients may call this machine by, and web pages of `origins` may call it.
    Once ready it prints the lines to paste and writes `home/service.json`. Raises `ServiceError`
    when the home is being served already, the port is taken, or one of these does not fit.
    """
    _check_network(host, tls, insecure, origins)
    home = (home or paths.home()).resolve()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ["LABKIT_HOME"] = str(home)  # the engine keeps what it measures of the machine there
    if base is None:
        from labkit import assets

        base = assets.base_model()
    with _only_service(home), _listening(host, port) as listener:
        hosts = LOCAL_NAMES | {name.lower() for name in names} | (set() if host in LOOPBACK else _own_names(host))
        app = create_app(home, base.resolve(), _key(home), base_name, frozenset(hosts), origins, warm)
        _log_to_stderr()
        server = Server(app, home, listener, base_name, idle_exit, tls)
        # uvicorn raises the signal again after its clean end, which would end this process before ours.
        previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        finally:
            (home / "service.json").unlink(missing_ok=True)
            for number, handler in previous.items():
                signal.signal(number, handler)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's own exit aborts while the scheduler's thread is in torch, loading the model, say


class Server(uvicorn.Server):
    """uvicorn's server, which tells when it is ready, and ends when it was idle for long."""

    def __init__(self, app: FastAPI, home: Path, listener: socket.socket, base_name: str,
                 idle_exit: float | None, tls: tuple[Path, Path] | None) -> None:
        certificate, key = tls or (None, None)
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                                        timeout_graceful_shutdown=GRACE_SECONDS, ssl_certfile=certificate,
                                        ssl_keyfile=key))
        self.app, self.home, self.base_name, self.idle_exit = app, home, base_name, idle_exit
        address, self.port = listener.getsockname()[:2]
        scheme, all_addresses = "https" if tls else "http", address in ALL_ADDRESSES
        # A certificate names the machine, hardly ever an address.
        here = socket.gethostname() if tls and all_addresses else ALL_ADDRESSES.get(
            address, f"[{address}]" if ":" in address else address)
        self.url = f"{scheme}://{here}:{self.port}/v1"
        self.outside = f"{scheme}://{socket.gethostname()}:{self.port}/v1" if all_addresses else None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say where."""
        await super().startup(sockets)
        paths.write_text(self.home / "service.json",
                         json.dumps({"pid": os.getpid(), "url": self.url, "port": self.port}))
        command = "set" if os.name == "nt" else "export"
        print(f"Serving {self.base_name} from {self.home}. Paste these lines into another terminal; Ctrl-C ends.\n"
              f"{command} OPENAI_BASE_URL={self.url}\n{command} OPENAI_API_KEY={_key(self.home)}", flush=True)
        if self.outside:
            print(f"Other machines use OPENAI_BASE_URL={self.outside}, or this machine's address in place of its "
                  "name, and a key of their own: labkit keys add NAME", flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        idle = self.idle_exit is not None and self.app.state.activity.idle_seconds() > self.idle_exit
        if idle and counter % 10 == 0 and not await asyncio.to_thread(self.app.state.supervisor.busy):
            return True
        return await super().on_tick(counter)


def _check_network(host: str, tls: tuple[Path, Path] | None, insecure: bool, origins: Sequence[str]) -> None:
    if host not in LOOPBACK and not (tls or insecure):
        raise ServiceError(f"Listening on {host} lets other machines in, and without TLS anyone on the network could "
                           "read keys and texts on their way. Give --tls-cert FILE and --tls-key FILE, or --insecure "
                           "if you trust the network, or listen on this machine only with --host 127.0.0.1.")
    if tls:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*tls, password="")  # never asks
        except OSError as error:
            raise ServiceError(f"{tls[0]} and {tls[1]} cannot be used for TLS ({error}). --tls-cert needs a "
                               "certificate in PEM format, --tls-key its private key without a password.") from error
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise ServiceError(f"{origin!r} is no origin of web pages. Write --allow-origin as a browser does: scheme, "
                               "name and port without a path, such as https://example.org or http://localhost:3000.")


def _own_names(host: str) -> set[str]:
    """What clients call a machine that listens on `host`; its addresses need not be listed (see `gate`)."""
    name = socket.gethostname().lower()
    return {name, f"{name.split('.')[0]}.local", *([] if host in ALL_ADDRESSES else [host.lower()])}


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
        paths.write_text(path, f"{keys.new_key()}\n", private=True)
    return path.read_text().strip()


def _log_to_stderr() -> None:
    """Structured lines of our own as they are; uvicorn's rare warnings beside them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("labkit.service")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").addFilter(_no_cancelled)


def _no_cancelled(record: logging.LogRecord) -> bool:
    """Not the traceback of each reply that a shutdown cuts off: uvicorn tells before how many these are."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
