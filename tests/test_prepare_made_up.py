"""`labkit prepare` on made-up input: any bytes, and rows that are almost right."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from labkit import examples
from labkit.examples.prepare import prepare
from tests.conftest import jsonl
from tests.test_assets import base_folder  # noqa: F401
from tests.test_prepare import chats, pairs
from tests.test_tokens import real_tokenizer  # noqa: F401

GENTLE = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
LOOSE = st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2))
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", 3]),
                                 "content": st.one_of(TEXT, LOOSE)}, optional={"weight": LOOSE, "tool_calls": LOOSE})
ROW = st.one_of(
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}, optional={"author": LOOSE}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}),
    st.fixed_dictionaries({"Prompt": st.one_of(TEXT, LOOSE), "completion": LOOSE}))


@GENTLE
@given(content=st.binary(max_size=300), ending=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".txt"]))
@example(content=b"prompt\rcompletion", ending=".csv")  # the line ends of old Macs
def test_any_bytes_give_findings(content: bytes, ending: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("any") / f"rows{ending}"
    file.write_bytes(content)
    result = prepare(file, fix="all")
    assert result.findings and (not result.fit or not examples.check(result.outputs["train"]).problems)
    assert file.read_bytes() == content and json.dumps(result.as_dict())


@GENTLE
@given(rows=st.lists(ROW, max_size=25), sound=st.sampled_from([pairs(15), chats(15)]))
def test_prepared_is_valid_and_preparing_again_changes_nothing(
        rows: list[Any], sound: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("any") / "rows.jsonl"
    file.write_bytes(jsonl(rows + sound))
    once = prepare(file, fix="all")
    if not once.fit:
        return
    assert not examples.check(once.outputs["train"]).problems
    twice = prepare(once.outputs["train"], fix="all")
    assert twice.outputs["train"].read_bytes() == once.outputs["train"].read_bytes()
    assert "set_aside" not in twice.outputs
