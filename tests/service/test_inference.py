"""/v1/completions and /v1/chat/completions on the base model."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import uvicorn

from labkit.engine import generate
from labkit.service import inference
from labkit.service.app import create_app
from tests.conftest import RunningService, wait_until

BASE = "tiny-llama"
HELLO: Any = [{"role": "user", "content": "hello there"}]


def complete(client: openai.OpenAI, prompt: Any = "the game", **options: Any) -> Any:
    return client.completions.create(**({"model": BASE, "prompt": prompt, "max_tokens": 8, "temperature": 0} | options))


def chat(client: openai.OpenAI, **options: Any) -> Any:
    wanted = {"model": BASE, "messages": HELLO, "max_completion_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**(wanted | options))


def logged(service: RunningService, **wanted: Any) -> Any:
    """The log line of the request with these fields, once it is there; it is written after the answer."""
    return wait_until(lambda: next((line for line in service.log("request")
                                    if all(line.get(name) == value for name, value in wanted.items())), None))


def test_many_prompts_are_answered_in_order_as_one_by_one(client: openai.OpenAI) -> None:
    prompts = [f"post number {i} " + "game " * (i % 7) for i in range(40)]
    together = complete(client, prompts)
    assert [choice.index for choice in together.choices] == list(range(40))
    for i in (0, 3, 39):
        assert together.choices[i].text == complete(client, prompts[i]).choices[0].text
    assert together.usage.total_tokens == together.usage.prompt_tokens + together.usage.completion_tokens


def test_seeds_decide_and_answers_differ(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        return [choice.text for choice in complete(client, temperature=1, seed=seed, n=3).choices]

    assert texts(1) == texts(1) != texts(2)
    assert len(set(texts(1))) == 3


def test_logprobs_describe_the_text(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3, temperature=1, seed=4, max_tokens=20).choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) > 5
    for token, logprob, top, offset in zip(told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset,
                                           strict=True):
        assert logprob <= 0 and 3 <= len(top) <= 4 and top[token] == logprob
        assert token.startswith(("bytes:", "<|")) or choice.text[offset:].startswith(token)
    plain = complete(client, logprobs=0).choices[0].logprobs
    assert plain.top_logprobs is None and len(plain.token_logprobs) == 8


def test_echo_shows_the_prompt_and_scores_it(client: openai.OpenAI) -> None:
    alone = complete(client, "the game tonight", echo=True, max_tokens=0, logprobs=1)
    choice = alone.choices[0]
    assert (choice.text, choice.finish_reason, alone.usage.completion_tokens) == ("the game tonight", "length", 0)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert "".join(choice.logprobs.tokens) == "the game tonight"
    # The score of a text's last token as part of a prompt is the one it has as an answer.
    greedy = complete(client, "the game tonight", max_tokens=1, logprobs=1).choices[0]
    if "bytes:" not in greedy.logprobs.tokens[0]:
        longer = complete(client, "the game tonight" + greedy.text, echo=True, max_tokens=0, logprobs=1).choices[0]
        if len(longer.logprobs.tokens) == len(choice.logprobs.tokens) + 1:
            assert longer.logprobs.token_logprobs[-1] == pytest.approx(greedy.logprobs.token_logprobs[0], abs=1e-4)
    both = complete(client, ["the game", "a bat"], echo=True, n=2, max_tokens=3, logprobs=1)
    assert [c.text.startswith(("the game", "the game", "a bat", "a bat")[c.index]) for c in both.choices] == [True] * 4
    assert both.choices[2].logprobs.text_offset[-1] >= len("a bat")


def test_stop_sequences_end_the_text_before_them(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=30).choices[0].text
    stop = text[6:8]
    stopped = complete(client, max_tokens=30, stop=[stop, "never seen"], logprobs=1).choices[0]
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"
    assert all(offset < len(stopped.text) for offset in stopped.logprobs.text_offset)
    streamed = "".join(c.choices[0].text for c in complete(client, max_tokens=30, stop=stop, stream=True))
    assert streamed == stopped.text


def test_a_bias_and_the_end_of_text(client: openai.OpenAI) -> None:
    ended = complete(client, logit_bias={"2": 100}, logprobs=1)  # the end-of-text token
    choice = ended.choices[0]
    assert (choice.text, choice.finish_reason, choice.logprobs.tokens) == ("", "stop", [])
    assert ended.usage.completion_tokens == 0
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, logit_bias={"99999": 1})
    assert error.value.param == "logit_bias"


@pytest.mark.parametrize("special", ["0", "1"])
def test_special_tokens_count_where_an_answer_is_cut(client: openai.OpenAI, special: str) -> None:
    options: dict[str, Any] = {"logit_bias": {special: 100}, "max_tokens": 5, "logprobs": 0}
    cut = complete(client, **options)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("", "length")
    assert cut.usage.completion_tokens == len(cut.choices[0].logprobs.tokens) == 5
    last = list(complete(client, stream=True, stream_options={"include_usage": True}, **options))[-1]
    assert last.usage.completion_tokens == 5


@pytest.mark.parametrize("temperature", [0, 0.01])
def test_penalties_drive_out_what_came_before(client: openai.OpenAI, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "logit_bias": {"40": 100, "41": 70}, "max_tokens": 30}

    def kinds(**penalties: float) -> int:
        return len(set(complete(client, logprobs=0, **options, **penalties).choices[0].logprobs.tokens))

    assert kinds() == kinds(presence_penalty=2) == kinds(frequency_penalty=-2) == 1
    assert kinds(frequency_penalty=2) == 2  # thirty of them are taken away by the fifteenth token
    del options["max_tokens"]
    answer = chat(client, max_completion_tokens=30, frequency_penalty=2, logprobs=True, **options)
    assert len({entry.token for entry in answer.choices[0].logprobs.content}) == 2


def test_prompts_as_token_ids(client: openai.OpenAI) -> None:
    assert complete(client, [5, 6, 7]).usage.prompt_tokens == 3
    assert len(complete(client, [[5, 6, 7], [8]]).choices) == 2
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, [5, 10**6])
    assert error.value.param == "prompt"


def test_best_of_returns_the_likeliest(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1, "seed": 3, "logprobs": 0, "max_tokens": 4}
    every = complete(client, n=4, **options).choices
    best = complete(client, best_of=4, n=1, **options)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / max(1, len(choice.logprobs.token_logprobs))

    assert best.choices[0].text == max(every, key=mean).text
    assert best.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in every)


def test_the_prompt_cache_is_reported(client: openai.OpenAI) -> None:
    prompt = "a prompt that nobody sent before, cached by its second time " * 3
    first, second = complete(client, prompt), complete(client, prompt)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 1
    assert first.choices[0].text == second.choices[0].text


def test_chat_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1, "seed": 11, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **options)
    assert whole.object == "chat.completion" and whole.system_fingerprint.startswith(f"fp_{BASE}")
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **options))
    for choice in whole.choices:
        parts = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert parts[0].delta.role == "assistant" and parts[-1].finish_reason == choice.finish_reason
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [entry for part in parts if part.logprobs for entry in part.logprobs.content] == choice.logprobs.content
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_chat_accepts_what_the_sdk_sends_back(client: openai.OpenAI) -> None:
    answer = chat(client).choices[0].message
    parts = [{"type": "text", "text": "and "}, {"type": "text", "text": "now?"}]
    again = chat(client, messages=[*HELLO, answer, {"role": "user", "content": parts}])
    assert again.usage.prompt_tokens > chat(client).usage.prompt_tokens


def test_without_a_limit_an_answer_may_fill_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=HELLO, temperature=0, logit_bias={"2": -100})
    assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("length", 256)


def test_aliases_are_disclosed(client: openai.OpenAI, service: RunningService) -> None:
    answer = chat(client, model="gpt-4o-mini")
    assert answer.model == "gpt-4o-mini" and BASE in answer.system_fingerprint
    line = logged(service, id=answer._request_id)
    assert line["alias_of"] == BASE and line["model"] == "gpt-4o-mini"


REFUSED = [
    ({"nonsense": 1}, "nonsense", "unknown_parameter"), ({"tools": [{"type": "function"}]}, "tools", None),
    ({"presence_penalty": 2.5}, "presence_penalty", None), ({"frequency_penalty": -3}, "frequency_penalty", None),
    ({"temperature": 3}, "temperature", None),
    ({"temperature": "warm"}, "temperature", "invalid_type"), ({"n": 0}, "n", None), ({"n": True}, "n", None),
    ({"top_logprobs": 2}, "top_logprobs", None), ({"stop": ["a"] * 5}, "stop", None), ({"stop": ""}, "stop[0]", None),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"messages": []}, "messages", None), ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", None),
    ({"messages": [{"role": "user", "content": "x " * 999}]}, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize("options, param, code", REFUSED)
def test_what_is_not_offered_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, extra_body=options)
    assert error.value.param == param and (code is None or error.value.code == code)


def test_a_text_longer_than_any_tokens_that_fit_is_refused_unread(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="9,000,000 characters") as error:
        client.completions.create(model=BASE, prompt=["short", "x" * 9_000_000])
    assert error.value.code == "context_length_exceeded"


def test_a_stream_is_refused_before_it_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, stream=True, messages=[{"role": "user", "content": "x " * 999}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        complete(client, model="unknown", stream=True)


def test_values_that_ask_for_nothing_pass(client: openai.OpenAI) -> None:
    off = {"tools": [], "tool_choice": "none", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
           "response_format": {"type": "text"}, "store": False, "n": 1, "logprobs": False, "stop": None, "seed": None,
           "service_tier": "auto", "parallel_tool_calls": True, "modalities": ["text"], "user": "someone",
           "functions": None, "metadata": None, "stream": False, "stream_options": None, "top_logprobs": 0}
    assert chat(client, extra_body=off).choices[0].message.content == chat(client).choices[0].message.content


LONG: Any = {"n": 16, "temperature": 1, "max_completion_tokens": 200, "logit_bias": {"2": -100}}


def test_a_client_that_leaves_stops_its_answer(client: openai.OpenAI, service: RunningService) -> None:
    whole = logged(service, id=chat(client, **LONG)._request_id)["ms"]
    stream = chat(client, stream=True, **LONG)
    next(stream)
    stream.response.close()
    assert logged(service, id=stream.response.headers["x-request-id"])["ms"] < 0.9 * whole
    address = urlsplit(service.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    body = json.dumps({"model": BASE, "messages": HELLO} | LONG)
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {service.key}",
                                                              "Content-Type": "application/json"})
    time.sleep(whole / 10_000)  # a tenth of the time that it would take
    connection.close()
    assert logged(service, status=499, path="/v1/chat/completions")["ms"] < 0.9 * whole
    begin = time.perf_counter()
    complete(client, max_tokens=1)  # nothing that nobody waits for is in its way
    assert time.perf_counter() - begin < 0.9 * whole / 1000


def test_many_clients_at_once(client: openai.OpenAI) -> None:
    expected = complete(client, "post 1").choices[0].text
    found: list[str] = []

    def ask() -> None:
        for _ in range(3):
            found.append(complete(client, "post 1").choices[0].text)
            client.models.list()

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 48


def test_what_is_queued_for_a_slow_reader_holds_up_nobody() -> None:
    turns = []

    async def pieces() -> AsyncIterator[list[Any]]:
        for _ in range(100):
            yield []

    async def events(found: AsyncIterator[list[Any]]) -> AsyncIterator[dict[str, Any]]:
        async for _ in found:
            yield {}

    async def others() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def read() -> int:
        nobody: Any = SimpleNamespace(cancel=lambda call: None, pieces=pieces)
        response = await inference.stream(nobody, nobody, events)
        beside = asyncio.create_task(others())
        sent = [line async for line in response.body_iterator]
        beside.cancel()
        return len(sent)

    assert asyncio.run(read()) == 100  # the first says that the call was accepted; at the end comes [DONE]
    assert len(turns) >= 99


@pytest.mark.parametrize("ask", [
    lambda client: client.completions.create(model=BASE, prompt="x", max_tokens=99, temperature=0, stream=True),
    lambda client: client.chat.completions.create(model=BASE, messages=HELLO, temperature=0, stream=True),
    lambda client: client.responses.create(model=BASE, input="x", temperature=0, stream=True),
])
def test_an_error_inside_a_stream_is_raised_by_the_sdk(
    ask: Callable[[openai.OpenAI], Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service runs in this process here, so that its memory can be made to end in the middle of an answer."""
    plain, steps = generate.Generator.step, []

    def fails(self: generate.Generator) -> list[generate.Sequence]:
        steps.append(1)
        if len(steps) == 5:
            raise MemoryError("a secret text")
        return plain(self)

    monkeypatch.setattr(generate.Generator, "step", fails)
    monkeypatch.setenv("LABKIT_DTYPE", "float32")
    with in_this_process(tmp_path, tiny_model) as client:
        stream, seen = ask(client), []
        with pytest.raises(openai.APIError, match="The service failed") as error:
            for event in stream:
                seen.append(event)
        assert seen and error.value.code == "internal_error" and "secret" not in str(error.value)
        assert complete(client, max_tokens=2).choices  # the next request is answered


@contextmanager
def in_this_process(home: Path, base: Path) -> Iterator[openai.OpenAI]:
    """A client of a service that runs in a thread of this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(home, base, "sk-test", BASE), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        port = listener.getsockname()[1]
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-test", max_retries=0, timeout=30)
    finally:
        server.should_exit = True
        thread.join()


def test_a_slow_answer_holds_up_no_listing(client: openai.OpenAI) -> None:
    stream = chat(client, stream=True, **LONG)
    next(stream)
    begin = time.perf_counter()
    client.models.list()
    listed = time.perf_counter() - begin
    assert len(list(stream)) > 100  # the answer was still growing
    assert listed < time.perf_counter() - begin
