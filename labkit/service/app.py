"""The routes put together as one application."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from labkit.service import (
    batches,
    embeddings,
    errors,
    expiry,
    files,
    inference,
    jobs,
    keys,
    models,
    responses,
    uploads,
)
from labkit.service.batch_runner import BatchRunner
from labkit.service.gate import Gate
from labkit.service.models import Models
from labkit.service.scheduler import Scheduler
from labkit.service.store import Store
from labkit.service.supervisor import Supervisor

BASE_NAME = "smollm2-135m-instruct"
LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


class Activity:
    """When this service was last asked for anything, and how much it is answering now."""

    def __init__(self) -> None:
        self.latest, self.open = time.monotonic(), 0

    def touched(self, change: int) -> None:
        """A request begins (+1) or ends (-1)."""
        self.latest, self.open = time.monotonic(), self.open + change

    def idle_seconds(self) -> float:
        """How long nothing was asked for."""
        return 0.0 if self.open else time.monotonic() - self.latest


def create_app(
    home: Path,
    base: Path,
    key: str,
    base_name: str = BASE_NAME,
    hosts: frozenset[str] = LOCAL_NAMES,
    origins: Sequence[str] = (),
    warm: bool = True,
) -> FastAPI:
    """The service of the folder `home`, answering with the base model in the folder `base`.

    `key` is the default key; only its SHA-256 is kept. `hosts` are this service's names in Host
    headers; web pages of `origins` may call it (CORS), by default none may. `warm` loads the model
    at once instead of with the first prompt. Nobody else may serve `home` meanwhile (`run.serve`
    sees to that). `app.state` holds the `supervisor` and the `activity`. Raises `LabkitError` when
    the alias table is broken.
    """
    store = Store(home)
    store.sweep()
    keys.set_default(store, key)
    known = Models(base_name, models.read_aliases(home))
    scheduler = Scheduler(base, base_name, home / "cache" / "prompts")
    supervisor = Supervisor(store, base)
    activity = Activity()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        supervisor.start()
        runner.start()
        expiring = asyncio.create_task(expiry.watch(store))
        if warm:
            scheduler.warm()
        yield
        expiring.cancel()
        await runner.close()
        await asyncio.gather(asyncio.to_thread(supervisor.close), asyncio.to_thread(scheduler.close))

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    runner = BatchRunner(store, app)
    app.state.supervisor, app.state.activity = supervisor, activity
    router = APIRouter(prefix="/v1")
    router.include_router(files.routes())
    router.include_router(uploads.routes())
    router.include_router(batches.routes(runner.wake))
    router.include_router(jobs.routes(known, supervisor.wake))
    router.include_router(models.routes(known))
    for module in (inference, embeddings, responses):
        router.include_router(module.routes(known, scheduler))
    app.include_router(router)
    errors.install(app)
    app.add_middleware(Gate, store=store, hosts=hosts, touched=activity.touched)
    if origins:  # around the gate, since a browser asks for permission without a key
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST", "DELETE"],
                           allow_headers=["*"], expose_headers=["x-request-id", "retry-after"])
    return app
