"""A plain `openai.OpenAI`, pointed at the service on this machine or at a provider."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from labkit import assets, paths
from labkit.client.budget import limited
from labkit.errors import ServiceError

START_SECONDS = 60.0  # a slow disk and a virus scanner can hold up the first start
IDLE_MINUTES = 60  # a service that was started for a notebook ends itself after so long without work
WINDOWS_DETACHED = sum(getattr(subprocess, flag, 0) for flag in ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW"))
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_latest: openai.OpenAI | None = None


def connect(provider: str = "local", *, budget_usd: float | None = None, **options: object) -> openai.OpenAI:
    """An OpenAI client; everything after this line is the plain SDK.

    `provider` is `"local"` (the service on this machine, started if none answers), `"openai"`
    (needs `OPENAI_API_KEY`), or the base URL of any compatible service, such as
    `"http://127.0.0.1:8712/v1"`. For a service of this machine the key is found in
    `LABKIT_HOME`; for others it is `api_key=…` or `OPENAI_API_KEY`. `options` go to
    `openai.OpenAI`. `budget_usd` refuses fine-tuning jobs that together would cost more, before they
    are sent (`BudgetError`); on this machine's service at the simulated price of the model that is
    named. Raises `ServiceError` when the service cannot be started, or no key is known.
    """
    global _latest
    prices = provider  # whose prices a budget is counted in
    if provider == "local":
        options = {"base_url": ensure_service(), "api_key": local_key()} | options
    elif provider != "openai":
        if "://" not in provider:
            raise ServiceError(f"{provider!r} is no provider; use \"local\", \"openai\" or a base URL (http…/v1).")
        options = {"base_url": provider} | options
        if urlsplit(provider).hostname in LOOPBACK and (paths.home() / "api_key").exists():
            options = {"api_key": local_key()} | options
            prices = "local"
    client = openai.OpenAI if budget_usd is None else limited(budget_usd, prices)
    try:
        _latest = client(**options)  # type: ignore[arg-type]
    except openai.OpenAIError as error:
        raise ServiceError(f"No API key for {provider}: set OPENAI_API_KEY, or pass api_key=… to connect().") from error
    return _latest


def latest_client() -> openai.OpenAI:
    """The client that `connect` made last; connects locally if it never ran."""
    return _latest or connect()


def local_key() -> str:
    """The key of this machine's service. Raises `ServiceError` before the first start."""
    try:
        return (paths.home() / "api_key").read_text().strip()
    except FileNotFoundError:
        raise ServiceError("This machine's service has no key yet; start it once: python -m labkit serve") from None


def running_service() -> str | None:
    """The base URL of this machine's service if it answers, else None."""
    try:
        url = f"{_noted()['url'].rstrip('/').removesuffix('/v1')}/v1"
        openai.OpenAI(base_url=url, api_key=local_key(), max_retries=0, timeout=10).models.list()
    except (OSError, ValueError, KeyError, openai.OpenAIError, ServiceError):
        return None
    return url


def ensure_service() -> str:
    """The base URL of this machine's service, which is started first if none answers."""
    if url := running_service():
        return url
    assets.base_model()  # here, where its progress can be seen
    log = paths.home() / "service.log"
    command = [sys.executable, "-m", "labkit", "serve", "--port", "0", "--idle-exit", str(IDLE_MINUTES)]
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output,  # stdout shows the key
            start_new_session=True,  # Ctrl-C in the notebook is not for the service; on Windows the flags see to it
            creationflags=WINDOWS_DETACHED,
        )
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if url := running_service():
            return url
        if process.poll() not in (None, 0):
            time.sleep(1)  # another process may have started one at the same moment
            if url := running_service():
                return url
            break
        time.sleep(0.1)
    raise ServiceError(f"The local service did not start. Its last words ({log}):\n{_tail(log)}\n"
                       "Start it in a terminal to see more: python -m labkit serve")


def stop_service() -> bool:
    """Ask this machine's service to end; returns whether one was running. A running job resumes at the next start."""
    if not running_service():
        return False
    os.kill(_noted()["pid"], signal.SIGTERM)
    end = time.monotonic() + 15
    while running_service() and time.monotonic() < end:
        time.sleep(0.1)
    return True


def _noted() -> dict[str, Any]:
    """What the running service wrote about itself: pid and url."""
    return json.loads((paths.home() / "service.json").read_text())


def _tail(log: Path, lines: int = 8) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
