"""The SDK's own types as the shape of all that the service stores and answers.

`openai.types` are pydantic models, so they are the schema: each function here builds one and
returns it as plain JSON data. Nothing of OpenAI's contract is typed out a second time.
"""

import secrets
import string
import time
from typing import Any

from openai import BaseModel
from openai.types import Batch, FileObject, Model, Upload
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from openai.types.uploads import UploadPart

ALPHABET = string.ascii_letters + string.digits
ORGANIZATION = "local"  # what stands for the organisation in the names of fine-tuned models
PENDING = ("validating_files", "queued", "running", "paused")  # a job that may still go on
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")  # a batch that is still worked on
Body = dict[str, Any]


def now() -> int:
    """The time in whole seconds since 1970, as all timestamps of the API are."""
    return int(time.time())


def new_id(prefix: str, length: int = 24) -> str:
    """A fresh id that nobody can guess: `new_id("ftjob-")`."""
    return prefix + "".join(secrets.choice(ALPHABET) for _ in range(length))


def made(kind: type[BaseModel], **fields: Any) -> Body:
    """An object of an SDK type as JSON data, validated, with exactly the fields that were given."""
    return kind.model_validate(fields).to_dict(mode="json")


def made_loosely(kind: type[BaseModel], **fields: Any) -> Body:
    """The same without validation, for what OpenAI itself sends otherwise than the SDK's types have it."""
    return kind.construct(**fields).to_dict(mode="json", warnings=False)


def file(id: str, filename: str, purpose: str, size: int, expires_at: int | None = None) -> Body:
    """A stored file of `size` bytes."""
    # Loosely: the SDK lets "evals" be uploaded, but its FileObject does not list it.
    return made_loosely(
        FileObject, id=id, object="file", bytes=size, created_at=now(), filename=filename, purpose=purpose,
        status="processed", status_details=None, expires_at=expires_at)


def upload(filename: str, purpose: str, size: int, lifetime: int) -> Body:
    """An upload in parts of `size` bytes as it is created; it expires after `lifetime` seconds."""
    time = now()
    return made(Upload, id=new_id("upload_"), object="upload", bytes=size, created_at=time, expires_at=time + lifetime,
                filename=filename, purpose=purpose, status="pending", file=None)


def part(upload_id: str) -> Body:
    """A part of an upload."""
    return made(UploadPart, id=new_id("part_"), object="upload.part", created_at=now(), upload_id=upload_id)


def batch(endpoint: str, input_file_id: str, window: str, lifetime: int, metadata: dict[str, str] | None) -> Body:
    """A batch as it is created; it expires after `lifetime` seconds."""
    time = now()
    unset = dict.fromkeys(("cancelled_at", "cancelling_at", "completed_at", "error_file_id", "errors", "expired_at",
                           "failed_at", "finalizing_at", "in_progress_at", "model", "output_file_id", "usage"))
    return made(Batch, id=new_id("batch_"), object="batch", endpoint=endpoint, input_file_id=input_file_id,
                completion_window=window, created_at=time, expires_at=time + lifetime, status="validating",
                metadata=metadata, request_counts={"total": 0, "completed": 0, "failed": 0}, **unset)


def job(id: str, model: str, training_file: str, validation_file: str | None, seed: int,
        hyperparameters: Body, metadata: dict[str, str] | None) -> Body:
    """A job as it is created; "paused", which the SDK's type lacks, is only ever set later."""
    return made(
        FineTuningJob, id=id, object="fine_tuning.job", created_at=now(), finished_at=None, model=model,
        fine_tuned_model=None, organization_id=ORGANIZATION, status="validating_files", training_file=training_file,
        validation_file=validation_file, result_files=[], trained_tokens=None, estimated_finish=None,
        hyperparameters=hyperparameters, seed=seed, error=None, integrations=[], metadata=metadata,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )


def event(message: str, level: str = "info", kind: str = "message", data: Body | None = None) -> Body:
    """Something that happened to a job; `kind` is "message" or "metrics"."""
    return made(
        FineTuningJobEvent, id=new_id("ftevent-"), object="fine_tuning.job.event", created_at=now(), level=level,
        message=message, type=kind, data=data or {})


def checkpoint(job_id: str, step: int, model: str, metrics: dict[str, float | None]) -> Body:
    """A job's adapter after an epoch, usable as `model`."""
    return made(
        FineTuningJobCheckpoint, id=new_id("ftckpt_"), object="fine_tuning.job.checkpoint", created_at=now(),
        fine_tuning_job_id=job_id, step_number=step, fine_tuned_model_checkpoint=model,
        metrics={"step": step, **metrics})


def model(name: str, root: str, parent: str | None = None, job_id: str | None = None,
          created: int | None = None) -> Body:
    """A model with its lineage: the base it stands on, what it was trained from, and by which job."""
    return made(Model, id=name, object="model", created=now() if created is None else created, owned_by=ORGANIZATION,
                root=root, parent=parent, fine_tuning_job=job_id)
