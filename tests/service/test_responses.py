"""/v1/responses through the real client."""

from typing import Any

import openai
import pytest

from tests.conftest import BASE_NAME, RunningService, wait_until


def respond(client: openai.OpenAI, **options: Any) -> Any:
    wanted = {"model": BASE_NAME, "input": "hello there", "max_output_tokens": 8, "temperature": 0}
    return client.responses.create(**(wanted | options))


def test_a_response_is_what_chat_would_answer(client: openai.OpenAI) -> None:
    answer = respond(client, instructions="Be brief.", metadata={"who": "me"})
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello there"}]
    chat = client.chat.completions.create(model=BASE_NAME, messages=messages, max_completion_tokens=8, temperature=0)
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.object, answer.output[0].role, answer.instructions) == ("response", "assistant", "Be brief.")
    assert answer.metadata == {"who": "me"} and BASE_NAME in answer.system_fingerprint
    assert chat.usage is not None and answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_the_end_of_an_answer_is_told(client: openai.OpenAI, service: RunningService) -> None:
    cut = respond(client)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    model = "gpt-4o-mini"
    whole = respond(client, model=model, max_output_tokens=None, temperature=1)
    assert whole.status in ("completed", "incomplete") and whole.model == model
    wait_until(lambda: any(line.get("alias_of") == BASE_NAME and line["path"] == "/v1/responses"
                           for line in service.log("request")))


def test_the_prompt_cache_is_reported(client: openai.OpenAI) -> None:
    text = "a question that nobody asked before, cached by its second time " * 3
    first, second = respond(client, input=text), respond(client, input=text)
    before, after = first.usage.input_tokens_details, second.usage.input_tokens_details
    assert before.cached_tokens + before.cache_write_tokens == after.cached_tokens == second.usage.input_tokens - 1
    assert after.cache_write_tokens == 0


def test_input_as_turns_and_as_what_came_back(client: openai.OpenAI) -> None:
    asked = [{"role": "user", "content": [{"type": "input_text", "text": "hello "}, {"type": "input_text",
                                                                                     "text": "there"}]}]
    answer = respond(client, input=asked)
    assert answer.output_text == respond(client).output_text
    again = respond(client, input=[*asked, *answer.output, {"role": "user", "content": "and now?"}])
    assert again.usage.input_tokens > answer.usage.total_tokens


def test_a_stream_has_the_events_of_the_sdk(client: openai.OpenAI) -> None:
    events = list(respond(client, stream=True, max_output_tokens=20))
    names = [event.type.removeprefix("response.") for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert names == ["created", "in_progress", "output_item.added", "content_part.added",
                     *["output_text.delta"] * len(deltas), "output_text.done", "content_part.done",
                     "output_item.done", "incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    whole = respond(client, max_output_tokens=20)
    last = events[-1].response
    assert "".join(deltas) == events[-4].text == last.output_text == whole.output_text and len(deltas) > 1
    assert last.usage.output_tokens == whole.usage.output_tokens and last.id == events[0].response.id


def test_the_sdks_stream_helper_follows(client: openai.OpenAI) -> None:
    with client.responses.stream(model=BASE_NAME, input="hello there", max_output_tokens=8, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == respond(client).output_text


@pytest.mark.parametrize("options, param", [
    ({"store": True}, "store"), ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"tools": [{"type": "web_search"}]}, "tools"), ({"background": True}, "background"),
    ({"text": {"format": {"type": "json_object"}}}, "text.format.type"), ({"nonsense": 1}, "nonsense"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"), ({"input": []}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
    ({"input": "x " * 999}, "input"), ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"truncation": "auto"}, "truncation"), ({"include": ["message.output_text.logprobs"]}, "include"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_offered_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        respond(client, extra_body=options, stream=stream)
    assert error.value.param == param


def test_values_that_ask_for_nothing_pass(client: openai.OpenAI) -> None:
    off = {"store": False, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "background": False,
           "text": {"format": {"type": "text"}}, "truncation": "disabled", "include": [], "reasoning": {},
           "previous_response_id": None, "user": "someone", "service_tier": "auto", "top_logprobs": 0}
    assert respond(client, extra_body=off).output_text == respond(client).output_text


def test_responses_are_not_stored_and_it_says_so(client: openai.OpenAI) -> None:
    answer = respond(client)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="stores none"):
            ask(answer.id)
