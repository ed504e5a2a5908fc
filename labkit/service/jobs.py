"""/v1/fine_tuning/jobs. Routes only write what is wanted; the supervisor and its workers act on it.

A job's status in the database is all the control there is: a worker looks at it before every
step, and stops when it is no longer "running".
"""

import secrets
import shutil
from collections.abc import Callable, Sequence

from fastapi import APIRouter, Request

from labkit.service import files, keys, objects, retries
from labkit.service.errors import ApiError, bad_request
from labkit.service.keys import Mine
from labkit.service.models import Models, Weights
from labkit.service.objects import Body
from labkit.service.paging import listing, page
from labkit.service.schemas import Extension, JobCreate
from labkit.service.store import Row, Store

RANK = 16  # of an adapter, unless `labkit.rank` says otherwise


def find(store: Store, id: str) -> Row:
    """The job of that id. Raises 404."""
    row = store.get("job", id)
    if row is None:
        raise ApiError(404, f"No such fine-tuning job: '{id}'. fine_tuning.jobs.list() shows all jobs of yours.",
                       "fine_tune_not_found", "fine_tuning_job_id")
    return row


def routes(models: Models, wake: Callable[[], None]) -> APIRouter:
    """The routes under /v1/fine_tuning/jobs; `wake` tells the supervisor that there is something to do."""
    router = APIRouter(prefix="/fine_tuning/jobs")

    @router.post("")
    def create_job(body: JobCreate, request: Request, store: Mine) -> Body:
        weights = _trainable(models, store, body)
        request.state.note["model"] = body.model
        if weights.alias:
            request.state.note["alias_of"] = models.base_name
        created = _create(models, store, body, weights, retries.retried(request))
        wake()
        return created

    @router.get("")
    def list_jobs(request: Request, store: Mine) -> Body:
        wanted = page(request, store, "job", default=20, most=1000, filters=["metadata"])
        metadata = _metadata_filter(request)
        if metadata is None:
            return listing(store.rows("job", after=wanted.after, limit=wanted.limit + 1, newest_first=True), wanted)
        rows = store.rows("job", after=wanted.after, newest_first=True)
        return listing([row for row in rows if metadata(row)][: wanted.limit + 1], wanted)

    @router.get("/{id}")
    def retrieve_job(id: str, store: Mine) -> Body:
        return find(store, id).body

    @router.get("/{id}/events")
    def list_events(id: str, request: Request, store: Mine) -> Body:
        return _children(store, request, "event", id, default=20)

    @router.get("/{id}/checkpoints")
    def list_checkpoints(id: str, request: Request, store: Mine) -> Body:
        return _children(store, request, "checkpoint", id, default=10)

    @router.post("/{id}/cancel")
    def cancel_job(id: str, store: Mine) -> Body:
        ended = {"status": "cancelled", "finished_at": objects.now(), "estimated_finish": None}
        return _switch(store, id, objects.PENDING, ended, "cancelled", wake)

    @router.post("/{id}/pause")
    def pause_job(id: str, store: Mine) -> Body:
        active = ("validating_files", "queued", "running")
        return _switch(store, id, active, {"status": "paused", "estimated_finish": None}, "paused", wake)

    @router.post("/{id}/resume")
    def resume_job(id: str, store: Mine) -> Body:
        status = "queued" if find(store, id).inner["validated"] else "validating_files"
        return _switch(store, id, ("paused",), {"status": status}, "resumed", wake)

    return router


# --- create --------------------------------------------------------------------------------------


def _create(models: Models, store: Store, body: JobCreate, weights: Weights, retried: bool) -> Body:
    fingerprint = retries.fingerprint(body)
    id = objects.new_id("ftjob-")
    hyperparameters = {name: "auto" if value is None else value for name, value in body.settings()}
    created = objects.job(
        id, body.model, body.training_file, body.validation_file,
        secrets.randbelow(2**31) if body.seed is None else body.seed, hyperparameters, body.metadata)
    try:
        with store.transaction():  # within it no file and no model is deleted
            inner = _plan(models, store, body, weights) | {"fingerprint": fingerprint}
            for name in ("training_file", "validation_file"):
                if (file := getattr(body, name)) is not None:
                    files.check(store, name, file, "fine-tune")
            if retried and (earlier := retries.earlier(store, "job", fingerprint)):
                return earlier.body
            keys.check_jobs(store)
            keys.check_bytes(store, 1, "training_file")  # how large the model will be, nobody knows yet
            _copy_data(store, id, body, weights)
            store.add("job", created, inner=inner)
            store.add("event", objects.event(f"Created fine-tuning job: {id}"), id)
            if weights.alias:
                store.add("event", objects.event(
                    f"{body.model} is an alias on this service: the model that is trained is {models.base_name}, "
                    "on this machine."), id)
    except BaseException:
        shutil.rmtree(store.jobs / id, ignore_errors=True)
        raise
    return created


def _trainable(models: Models, store: Store, body: JobCreate) -> Weights:
    try:
        return models.weights(body.model, store)
    except ApiError as error:
        raise ApiError(400, f"Model '{body.model}' is not available for fine-tuning or does not exist. {error.message}",
                       "model_not_available", "model") from None


def _plan(models: Models, store: Store, body: JobCreate, weights: Weights) -> Body:
    """What only the service has to know about a job: how its model is made, and what it will be called."""
    wanted = body.labkit
    inner = {"root": models.base_name, "base": body.model,
             "adapter": wanted.adapter or "activated", "rank": wanted.rank or RANK,
             "limit": wanted.max_tokens_per_example, "parent": None, "validated": False, "step": 0,
             "model_id": objects.new_id("", 8)}
    if weights.folder is not None:
        parent = store.get("model", body.model)
        if parent is None:
            raise models.unknown(body.model, store)
        inner |= {"parent": body.model, **{name: parent.inner[name] for name in ("base", "adapter", "rank")}}
        _check_continues(wanted, parent)
    inner["name"] = f"ft:{inner['base']}:{objects.ORGANIZATION}:{body.suffix}:{inner['model_id']}"
    return inner


def _check_continues(wanted: Extension, parent: Row) -> None:
    for name in ("adapter", "rank"):
        if getattr(wanted, name) not in (None, parent.inner[name]):
            raise bad_request(f"'{parent.id}' has {name} {parent.inner[name]}, which training on cannot change. Leave "
                              f"out labkit.{name}, or start from the base model.", f"labkit.{name}")


def _copy_data(store: Store, id: str, body: JobCreate, weights: Weights) -> None:
    """The job's own copy of all it needs: files and models may be deleted while it waits or is paused."""
    wanted = {"training.jsonl": store.files / body.training_file}
    if body.validation_file:
        wanted["validation.jsonl"] = store.files / body.validation_file
    if weights.folder is not None:
        wanted |= {f"parent/{path.name}": path for path in weights.folder.iterdir()}
    for name, source in wanted.items():
        store.keep_copy(source, store.jobs / id / name)


# --- lists and switches --------------------------------------------------------------------------


def _children(store: Store, request: Request, kind: str, job_id: str, default: int) -> Body:
    find(store, job_id)
    wanted = page(request, store, kind, default=default, most=1000, parent=job_id)
    rows = store.rows(kind, job_id, after=wanted.after, limit=wanted.limit + 1, newest_first=True)
    return listing(rows, wanted)


def _metadata_filter(request: Request) -> Callable[[Row], bool] | None:
    """`metadata[k]=v` for some keys, or `metadata=null`."""
    pairs: dict[str, str] = {}
    for name, value in request.query_params.items():
        if name == "metadata":
            if value != "null" or len([key for key in request.query_params if key.startswith("metadata")]) > 1:
                raise bad_request("Filter by metadata[key]=value, or by metadata=null alone.", "metadata")
            return lambda row: row.body["metadata"] is None
        if name.startswith("metadata["):
            pairs[name.removeprefix("metadata[").removesuffix("]")] = value
    if not pairs:
        return None
    return lambda row: pairs.items() <= (row.body["metadata"] or {}).items()


def _switch(store: Store, id: str, expect: Sequence[str], body: Body, done: str, wake: Callable[[], None]) -> Body:
    """Move a job to another status, or answer 400, which the SDK does not retry as it would a 409."""
    with store.transaction():
        changed = store.change("job", id, body, {"place": None}, expect)
        if changed is None:
            status = find(store, id).body["status"]
            raise ApiError(400, f"Job {id} cannot be {done}: its status is '{status}'.", "invalid_job_state",
                           "fine_tuning_job_id", retry=False)
        store.add("event", objects.event(f"Fine-tuning job {done}"), id)
    wake()
    return changed.body
