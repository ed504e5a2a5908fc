"""/v1/embeddings: texts as vectors, from the base model's hidden states."""

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from openai.types import CreateEmbeddingResponse

from labkit.service import objects
from labkit.service.calls import Call, Sampling
from labkit.service.errors import bad_request
from labkit.service.inference import collect, gone, weights_for
from labkit.service.models import Models
from labkit.service.scheduler import Scheduler
from labkit.service.schemas_inference import EmbeddingCreate

NO_ANSWER = Sampling(max_tokens=0, temperature=0, top_p=1, seed=None, stop=())


def routes(models: Models, scheduler: Scheduler) -> APIRouter:
    """The route that embeds texts."""
    router = APIRouter()

    @router.post("/embeddings")
    async def create_embeddings(body: EmbeddingCreate, request: Request) -> Response:
        weights = await weights_for(models, body.model, None, request)
        if weights.folder is not None:
            raise bad_request(f"Embeddings come from the base model, not from a fine-tuned one. Ask for "
                              f"'{models.base_name}' instead of '{body.model}'.", "model", "model_not_supported")
        call = Call(request.state.store.owner, weights, list(body.input), NO_ANSWER, "input", embedded=True)
        scheduler.submit(call)
        found = await collect(scheduler, call, request)
        return gone() if found is None else await run_in_threadpool(_reply, body, call)

    return router


def _reply(body: EmbeddingCreate, call: Call) -> JSONResponse:
    vectors = np.stack([vector.numpy() for vector in call.vectors])
    if body.dimensions is not None:
        if body.dimensions > vectors.shape[1]:
            raise bad_request(f"Invalid 'dimensions': this model's embeddings have {vectors.shape[1]} dimensions.",
                              "dimensions")
        vectors = vectors[:, : body.dimensions]
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    data = [{"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)]
    tokens = sum(len(prompt.ids) for prompt in call.encoded)
    # Loosely: in base64 an embedding is a text, which the SDK's type has only after decoding.
    return JSONResponse(objects.made_loosely(
        CreateEmbeddingResponse, object="list", model=call.weights.name, data=data,
        usage={"prompt_tokens": tokens, "total_tokens": tokens}, system_fingerprint=call.fingerprint))


def _written(vector: np.ndarray, encoding: str) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
