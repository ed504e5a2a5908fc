"""/v1/completions and /v1/chat/completions, whole or streamed, and what all inference routes have in common."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from labkit.service import answers
from labkit.service.calls import Call, Piece, Sampling
from labkit.service.errors import ApiError, from_exception, internal_error
from labkit.service.models import Models, Weights
from labkit.service.objects import Body
from labkit.service.scheduler import Scheduler
from labkit.service.schemas_inference import ChatCreate, CompletionCreate
from labkit.service.schemas_inference import Sampling as Common


def routes(models: Models, scheduler: Scheduler) -> APIRouter:
    """The routes that answer prompts."""
    router = APIRouter()

    @router.post("/completions")
    async def create_completion(body: CompletionCreate, request: Request) -> Response:
        weights = await weights_for(models, body.model, "completion", request)
        sampling = _sampling(body, body.max_tokens, body.logprobs or 0)
        scored = body.echo and body.logprobs is not None
        call = Call(request.state.store.owner, weights, list(body.prompt), sampling, copies=body.best_of or body.n,
                    scored=scored, echoed=body.echo, streamed=body.stream)
        shape = answers.Completions(call, body.logprobs)
        scheduler.submit(call)
        if body.stream:
            return await stream(scheduler, call, _completion_events(body, call, shape))
        found = await collect(scheduler, call, request)
        return JSONResponse(_completion(body, call, shape, found)) if found is not None else gone()

    @router.post("/chat/completions")
    async def create_chat_completion(body: ChatCreate, request: Request) -> Response:
        weights = await weights_for(models, body.model, "chat", request)
        sampling = _sampling(body, body.max_completion_tokens or body.max_tokens, body.top_logprobs)
        conversation = tuple({"role": message.role, "content": message.content} for message in body.messages)
        call = Call(request.state.store.owner, weights, [conversation], sampling, "messages", copies=body.n,
                    streamed=body.stream)
        shape = answers.Chat(call, body.logprobs)
        scheduler.submit(call)
        if body.stream:
            return await stream(scheduler, call, _chat_events(body, call, shape))
        found = await collect(scheduler, call, request)
        return JSONResponse(shape.whole([found[index] for index in range(body.n)])) if found is not None else gone()

    return router


# --- before and after the scheduler --------------------------------------------------------------


async def weights_for(models: Models, name: str, form: str | None, request: Request) -> Weights:
    """What answers for a model's name. A fine-tuned model answers in the form it was trained on (None: any)."""
    weights = await run_in_threadpool(models.weights, name, request.state.store)
    request.state.note["model"] = name
    if weights.alias:
        request.state.note["alias_of"] = models.base_name
    if weights.form and form and weights.form != form:
        other = "chat/completions" if weights.form == "chat" else "completions"
        raise ApiError(404, f"'{name}' was fine-tuned on {weights.form} examples and is not supported in this "
                            f"endpoint. Did you mean to use v1/{other}?", "model_not_supported", "model")
    return weights


def _sampling(body: Common, max_tokens: int | None, top_logprobs: int) -> Sampling:
    return Sampling(max_tokens, body.temperature, body.top_p, body.seed, tuple(body.stop), top_logprobs,
                    body.logit_bias, body.presence_penalty, body.frequency_penalty)


async def collect(scheduler: Scheduler, call: Call, request: Request) -> dict[int, Piece] | None:
    """All answers of a call; None if the client has gone, which stops the call."""

    async def whole() -> dict[int, Piece]:
        return {piece.index: piece async for pieces in call.pieces() for piece in pieces}

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting, leaving = asyncio.ensure_future(whole()), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else None
    finally:
        for task in (collecting, leaving):
            task.cancel()
        scheduler.cancel(call)


def gone() -> Response:
    """What is answered to a client that has left."""
    return Response(status_code=499)  # nobody reads it; the log line shows it


def _completion(body: CompletionCreate, call: Call, shape: answers.Completions, found: dict[int, Piece]) -> Body:
    choices: list[Body] = []
    for number in range(len(call.prompts)):
        first = number * call.copies
        candidates = [found.get(first + copy, Piece(first + copy, "", [], "length")) for copy in range(call.copies)]
        if call.copies > body.n:
            candidates = sorted(candidates, key=answers.mean_logprob, reverse=True)[: body.n]
        for candidate in candidates:
            choices.append(shape.choice(candidate, len(choices), number if body.echo else None))
    return shape.whole(choices, answers.usage(call, list(found.values())))


# --- streams -------------------------------------------------------------------------------------


async def stream(
    scheduler: Scheduler, call: Call, events: Callable[[AsyncIterator[list[Piece]]], AsyncIterator[Body]],
    named: bool = False,
) -> StreamingResponse:
    """Server-sent events. The call is accepted, or refused with an error status, before any header is sent.

    `named` events have a type, which is sent as their name as well, and the last of them ends the
    stream; the others end it with [DONE].
    """
    pieces = call.pieces()
    try:
        await anext(pieces)
    except BaseException:
        scheduler.cancel(call)
        raise

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events(pieces):
                name = f"event: {event['type']}\n" if named else ""
                yield f"{name}data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
                # Where thousands are queued for a slow reader, nothing else here waits: the others get their turn.
                await asyncio.sleep(0)
            if not named:
                yield "data: [DONE]\n\n"
        except Exception as error:
            known = from_exception(error) or internal_error()
            name, kind = ("event: error\n", {"type": "error"}) if named else ("", {})
            yield f"{name}data: {json.dumps(known.body() | kind)}\n\n"
        finally:  # also when the client has gone
            scheduler.cancel(call)

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _completion_events(
    body: CompletionCreate, call: Call, shape: answers.Completions
) -> Callable[[AsyncIterator[list[Piece]]], AsyncIterator[Body]]:
    async def events(pieces: AsyncIterator[list[Piece]]) -> AsyncIterator[Body]:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        every: list[Piece] = []
        echoed: set[int] = set()

        def chunk(piece: Piece) -> Body:
            echo = piece.index // call.copies if body.echo and piece.index not in echoed else None
            echoed.add(piece.index)
            return shape.whole([shape.choice(piece, piece.index, echo)], None, with_usage)

        async for group in pieces:
            for piece in worth_sending(group):
                every.append(piece)
                yield chunk(piece)
        if body.max_tokens == 0:
            for index in range(call.size):
                yield chunk(Piece(index, "", [], "length"))
        if with_usage:
            yield shape.whole([], answers.usage(call, every), True)

    return events


def _chat_events(
    body: ChatCreate, call: Call, shape: answers.Chat
) -> Callable[[AsyncIterator[list[Piece]]], AsyncIterator[Body]]:
    async def events(pieces: AsyncIterator[list[Piece]]) -> AsyncIterator[Body]:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        every: list[Piece] = []
        for index in range(call.size):
            yield shape.chunk(None, index, with_usage=with_usage)
        async for group in pieces:
            for piece in worth_sending(group):
                every.append(piece)
                if piece.finish_reason and (piece.text or piece.tokens):  # OpenAI's last chunk has no content
                    yield shape.chunk(Piece(piece.index, piece.text, piece.tokens, None), piece.index,
                                      with_usage=with_usage)
                    piece = Piece(piece.index, "", [], piece.finish_reason)
                yield shape.chunk(piece, piece.index, with_usage=with_usage)
        if with_usage:
            yield shape.chunk(None, used=answers.usage(call, every), with_usage=True)

    return events


def worth_sending(pieces: Iterable[Piece]) -> list[Piece]:
    """Without those that show nothing yet: half a character, or what may become a stop sequence."""
    return [piece for piece in pieces if piece.text or piece.tokens or piece.finish_reason]
