"""/v1/embeddings through the real client."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import BASE_NAME, RunningService, finished, posts, supervised, upload, wait_until


def embed(client: openai.OpenAI, texts: Any, **options: Any) -> Any:
    return client.embeddings.create(**({"model": BASE_NAME, "input": texts} | options))


def test_embeddings_are_the_mean_of_the_final_hidden_states(client: openai.OpenAI, tiny_model: Path) -> None:
    texts = ["the game tonight", "a", "the good game " * 9]
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    answer = embed(client, texts)
    assert [item.index for item in answer.data] == [0, 1, 2] and answer.model == BASE_NAME
    for text, item in zip(texts, answer.data, strict=True):
        with torch.no_grad():
            states = network.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states.mean(0), dim=0)
        assert item.embedding == pytest.approx(expected.tolist(), abs=1e-5)
    counts = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(counts)


def test_every_form_of_input_and_of_encoding_tells_the_same(client: openai.OpenAI, tiny_model: Path) -> None:
    ids = AutoTokenizer.from_pretrained(tiny_model)("the game tonight")["input_ids"]
    forms: list[Any] = ["the game tonight", ["the game tonight"], ids, [ids]]
    found = [embed(client, form).data[0].embedding for form in forms]  # the SDK asks for base64 and decodes it
    found.append(embed(client, ids, encoding_format="float").data[0].embedding)
    raw = embed(client, ids, encoding_format="base64").data[0].embedding  # asked for by name, it is handed on as it is
    found.append(np.frombuffer(base64.b64decode(raw), "<f4").tolist())
    for vector in found:
        assert vector == pytest.approx(found[0], abs=1e-6)


def test_many_texts_are_embedded_as_one_by_one(client: openai.OpenAI) -> None:
    texts = [f"post number {i} " + "game " * (i * 7 % 45) for i in range(60)]
    together = embed(client, texts)
    for i in (0, 6, 59):
        assert together.data[i].embedding == pytest.approx(embed(client, texts[i]).data[0].embedding, abs=1e-5)


def test_fewer_dimensions_are_cut_and_normalised_again(client: openai.OpenAI) -> None:
    whole = torch.tensor(embed(client, "the game").data[0].embedding)
    cut = torch.tensor(embed(client, "the game", dimensions=5).data[0].embedding)
    torch.testing.assert_close(cut, torch.nn.functional.normalize(whole[:5], dim=0), atol=1e-6, rtol=0)
    assert whole.norm() == pytest.approx(1, abs=1e-5)


def test_an_alias_is_disclosed(client: openai.OpenAI, service: RunningService) -> None:
    answer = embed(client, "the game", model="text-embedding-3-small")
    assert answer.model == "text-embedding-3-small" and BASE_NAME in answer.system_fingerprint
    wait_until(lambda: any(line.get("alias_of") == BASE_NAME and line["model"] == answer.model
                           for line in service.log("request")))


@pytest.mark.parametrize("options, param", [
    ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": ["a", ""]}, "input"),
    ({"input": ["a", [1]]}, "input"), ({"input": [10**6]}, "input"),
    ({"input": "x " * 999}, "input"), ({"dimensions": 33}, "dimensions"),
    ({"dimensions": 0}, "dimensions"), ({"encoding_format": "hex"}, "encoding_format"), ({"nonsense": 1}, "nonsense"),
])
def test_what_cannot_be_embedded_is_refused_by_name(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        embed(client, "the game", extra_body=options)
    assert error.value.param == param


def test_a_fine_tuned_model_embeds_nothing(client: openai.OpenAI) -> None:
    job = finished(client, client.fine_tuning.jobs.create(
        model=BASE_NAME, training_file=upload(client, posts()), method=supervised(n_epochs=1)).id)
    with pytest.raises(openai.BadRequestError, match=BASE_NAME) as error:
        embed(client, "the game", model=job.fine_tuned_model)
    assert error.value.param == "model"
