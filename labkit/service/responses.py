"""/v1/responses: plain text in and out, whole or streamed. Responses are not stored."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from openai.types import responses as sdk

from labkit.service import objects
from labkit.service.calls import Call, Piece, Sampling
from labkit.service.errors import ApiError
from labkit.service.inference import collect, gone, stream, weights_for, worth_sending
from labkit.service.models import Models
from labkit.service.objects import Body
from labkit.service.scheduler import Scheduler
from labkit.service.schemas_inference import ResponseCreate


def routes(models: Models, scheduler: Scheduler) -> APIRouter:
    """The routes under /v1/responses."""
    router = APIRouter()

    @router.post("/responses")
    async def create_response(body: ResponseCreate, request: Request) -> Response:
        weights = await weights_for(models, body.model, "chat", request)
        turns = [{"role": item.role, "content": item.content} for item in body.input]
        if body.instructions is not None:
            turns.insert(0, {"role": "system", "content": body.instructions})
        sampling = Sampling(body.max_output_tokens, body.temperature, body.top_p, None, ())
        call = Call(request.state.store.owner, weights, [tuple(turns)], sampling, "input", streamed=body.stream)
        answer = Answer(body, call)
        scheduler.submit(call)
        if body.stream:
            return await stream(scheduler, call, answer.events, named=True)
        found = await collect(scheduler, call, request)
        return gone() if found is None else JSONResponse(answer.ended(found[0].text, [found[0]]))

    @router.api_route("/responses/{path:path}", methods=["GET", "DELETE", "POST"])
    def stored_response(path: str) -> Body:
        raise ApiError(404, f"There is no response '{path}': this service stores none. Keep what responses.create "
                            "returned, and send the earlier turns in 'input' again.", "response_not_found")

    return router


class Answer:
    """One response object as it grows."""

    def __init__(self, body: ResponseCreate, call: Call) -> None:
        self.body, self.call = body, call
        self.id, self.item, self.created = objects.new_id("resp_"), objects.new_id("msg_"), objects.now()
        self._number = -1  # of the latest event

    def ended(self, text: str, pieces: list[Piece]) -> Body:
        """The response when its `text` is whole."""
        cut = pieces[-1].finish_reason == "length"
        prompt, cached = self.call.encoded[0], self.call.cached_tokens
        output = sum(len(piece.tokens) for piece in pieces)
        usage = {
            "input_tokens": len(prompt.ids), "output_tokens": output, "total_tokens": len(prompt.ids) + output,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt.start - cached},
            "output_tokens_details": {"reasoning_tokens": 0}}
        return self._response(
            "incomplete" if cut else "completed", [self._message(text, "incomplete" if cut else "completed")],
            incomplete_details={"reason": "max_output_tokens"} if cut else None, usage=usage,
            completed_at=None if cut else objects.now())

    async def events(self, pieces: AsyncIterator[list[Piece]]) -> AsyncIterator[Body]:
        """What a stream sends, in the SDK's event types."""
        place: dict[str, Any] = {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield self._event(sdk.ResponseCreatedEvent, "created", response=self._response("in_progress", []))
        yield self._event(sdk.ResponseInProgressEvent, "in_progress", response=self._response("in_progress", []))
        empty = self._message("", "in_progress") | {"content": []}
        yield self._event(sdk.ResponseOutputItemAddedEvent, "output_item.added", output_index=0, item=empty)
        yield self._event(sdk.ResponseContentPartAddedEvent, "content_part.added", part=_part(""), **place)
        every: list[Piece] = []
        async for group in pieces:
            for piece in worth_sending(group):
                every.append(piece)
                if piece.text:
                    yield self._event(sdk.ResponseTextDeltaEvent, "output_text.delta", delta=piece.text, logprobs=[],
                                      **place)
        text = "".join(piece.text for piece in every)
        whole = self.ended(text, every)
        yield self._event(sdk.ResponseTextDoneEvent, "output_text.done", text=text, logprobs=[], **place)
        yield self._event(sdk.ResponseContentPartDoneEvent, "content_part.done", part=_part(text), **place)
        yield self._event(sdk.ResponseOutputItemDoneEvent, "output_item.done", output_index=0, item=whole["output"][0])
        if whole["status"] == "incomplete":
            yield self._event(sdk.ResponseIncompleteEvent, "incomplete", response=whole)
        else:
            yield self._event(sdk.ResponseCompletedEvent, "completed", response=whole)

    def _event(self, kind: Any, name: str, **fields: Any) -> Body:
        self._number += 1
        return objects.made(kind, type=f"response.{name}", sequence_number=self._number, **fields)

    def _message(self, text: str, status: str) -> Body:
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": [_part(text)]}

    def _response(self, status: str, output: list[Body], **ending: Any) -> Body:
        body = self.body
        nothing = {"error": None, "incomplete_details": None, "usage": None, "completed_at": None}
        return objects.made(
            sdk.Response, id=self.id, object="response", created_at=self.created, status=status, output=output,
            model=self.call.weights.name, system_fingerprint=self.call.fingerprint, instructions=body.instructions,
            max_output_tokens=body.max_output_tokens, metadata=body.metadata, temperature=body.temperature,
            top_p=body.top_p, text={"format": {"type": "text"}}, truncation="disabled", store=False,
            parallel_tool_calls=True, tool_choice="auto", tools=[], previous_response_id=None, background=False,
            reasoning={"effort": None, "summary": None}, service_tier="default", user=body.user,
            **nothing | ending)


def _part(text: str) -> Body:
    return {"type": "output_text", "text": text, "annotations": []}
