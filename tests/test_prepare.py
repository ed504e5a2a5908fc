"""`labkit prepare`, through its command and its function: what it finds, mends, splits and writes."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openpyxl
import psutil
import pytest

from labkit import examples, tokens
from labkit.cli import main
from labkit.errors import DataError
from labkit.examples.examine import TokenCounter
from labkit.examples.formats import dump
from labkit.examples.prepare import Prepared, prepare
from labkit.examples.report import histogram
from tests.conftest import jsonl
from tests.test_assets import base_folder  # noqa: F401
from tests.test_tokens import real_tokenizer  # noqa: F401

TEAMS = ("bat", "ice", "home run", "goal", "pitcher", "puck")


def pairs(count: int = 30) -> list[dict[str, Any]]:
    """Sound prompt/completion examples of two labels, no two alike."""
    return [{"prompt": f"{i * 7919} saw {TEAMS[i % 6]} number {i} of year {i * i}\n\n###\n\n",
             "completion": (" baseball", " hockey")[i % 2]} for i in range(count)]


def chats(count: int = 30) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"what is {i * 7919} in words, the {i}th time?"},
                          {"role": "assistant", "content": f"number {i} of {i * i} and {i ** 3}"}]}
            for i in range(count)]


def codes(result: Prepared) -> dict[str, int]:
    return {finding.code: finding.count for finding in result.findings}


def found(folder: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, int]:
    file = folder / "rows.jsonl"
    file.write_bytes(jsonl(rows))
    return codes(prepare(file, **more))


def written(result: Prepared, part: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.outputs[part].read_bytes().splitlines()]


QUIET = {"few_examples", "no_validation"}


def test_a_sound_file_has_no_findings_but_advice(tmp_path: Path) -> None:
    assert found(tmp_path, pairs()).keys() == QUIET
    assert found(tmp_path, chats()).keys() == {"few_examples"}


def changed(index: int, **fields: Any) -> list[dict[str, Any]]:
    rows = pairs()
    rows[index] = {**rows[index], **fields}
    return rows


def chat_of(*messages: tuple[str, Any], **more: Any) -> list[dict[str, Any]]:
    return [*chats(), {"messages": [{"role": role, "content": content} for role, content in messages], **more}]


KEY = "sk-" + "a1B2" * 8
CASES = {
    "missing_field": [*pairs(), {"prompt": "x"}],
    "column_case": [{"Prompt": row["prompt"], "Completion": row["completion"]} for row in pairs()],
    "not_text": changed(3, prompt=7),
    "empty_completion": changed(3, completion=" "),
    "null_bytes": changed(3, completion=" hoc\x00key"),
    "malformed": [*chats(), {"messages": []}],
    "no_assistant": chat_of(("user", "x")),
    "unknown_role": chat_of(("user", "x"), ("robot", "y")),
    "roles_order": chat_of(("assistant", "first"), ("user", "x"), ("assistant", "y")),
    "outer_whitespace": chat_of(("user", "x"), ("assistant", "y ")),
    "hosted_only": chat_of(("user", "x"), ("assistant", "y"), tools=[{"type": "function"}]),
    "mixed_forms": [*chats(), *pairs(2)],
    "duplicates": [*pairs(), pairs()[4]],
    "near_duplicates": [*chats(), {"messages": [{"role": "user", "content": "What is 7919 in words -- the 1th time"},
                                               {"role": "assistant", "content": "number 1 of 1 and 1"}]}],
    "conflicts": [*pairs(), {**pairs()[4], "completion": " hockey"}],
    "over_token_limit": changed(3, prompt="a b " * 5_000 + "\n\n###\n\n"),
    "long_examples": changed(3, prompt="abcdefghi " * 1_001 + "\n\n###\n\n"),
    "prompt_case": [{**row, "prompt": row["prompt"].upper()} for row in pairs()],
    "completion_case": [{**row, "completion": row["completion"].upper()} for row in pairs()],
    "label_spelling": changed(3, completion=" Hockey"),
    "off_list": [*pairs(100), {"prompt": "something else\n\n###\n\n", "completion": " I do not know"}],
    "imbalance": [row for i, row in enumerate(pairs(60)) if i % 2 or i < 8],
    "prompt_separator": [{**row, "prompt": f"{row['prompt'].strip()} {i}"} for i, row in enumerate(pairs())],
    "separator_inside": changed(3, prompt="one\n\n###\n\ntwo\n\n###\n\n"),
    "equal_prompts": [{**row, "prompt": "x"} for row in pairs()],
    "equal_completions": [{**row, "completion": " yes"} for row in pairs()],
    "prompt_prefix": [{**row, "prompt": f"Tell the sport of: {row['prompt']}"} for row in pairs()],
    "completion_prefix": [{**row, "completion": f" The sport:{row['completion']}"} for row in pairs()],
    "completion_suffix": [{**row, "completion": f" {i} and {i * i}"} for i, row in enumerate(pairs())],
    "completion_space": changed(3, completion="hockey"),
    "secret_keys": changed(3, prompt=f"my key is {KEY}\n\n###\n\n"),
    "email_addresses": changed(3, prompt="From: someone.else@example.org\n\n###\n\n"),
    "card_numbers": changed(3, prompt="pay with 4111 1111 1111 1111\n\n###\n\n"),
    "extra_columns": changed(3, author="someone"),
    "too_few": pairs(9),
}


@pytest.mark.parametrize("code", CASES)
def test_each_finding_is_found_explained_and_mended(tmp_path: Path, code: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(CASES[code]))
    looked = prepare(file)
    finding = next(finding for finding in looked.findings if finding.code == code)
    assert finding.count and finding.message and finding.why and finding.fix and finding.severity
    assert not looked.outputs and list(tmp_path.iterdir()) == [file]
    if finding.fixable:
        mended = prepare(file, fix="all")
        assert mended.fit and file.read_bytes() == jsonl(CASES[code])
        assert codes(prepare(mended.outputs["train"])).keys().isdisjoint({code})
        assert not examples.check(mended.outputs["train"]).problems


def test_places_name_file_line_and_field(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = jsonl(pairs()).split(b"\n")
    rows[1:4] = b'{"prompt": "x", "completion" " y"}', b'{"prompt": "\xe9", "completion": " y"}', b"7\x00"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(rows))
    places = {finding.code: finding.places[0] for finding in prepare(file).findings if finding.places}
    assert places["invalid_json"] == (2, "column 30")
    assert places["not_utf8"] == (3, "byte 13") and places["null_bytes"] == (4, "byte 2") and places["bom"][0] == 1


def test_unreadable_lines_are_set_aside_with_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(pairs()) + b"\n{broken\n" + jsonl([{"prompt": "only"}]))
    result = prepare(file, fix="all")
    aside = written(result, "set_aside")
    assert [(row["line"], row["reason"], row["content"].strip()) for row in aside] == [
        (31, "invalid_json", "{broken"), (32, "missing_field", '{"prompt":"only"}')]
    assert written(result) == pairs() and result.outputs["train"].name == "rows_prepared.jsonl"


def test_the_same_rows_from_every_format(tmp_path: Path) -> None:
    rows = [{"prompt": f"{row['prompt']}", "completion": row["completion"]} for row in pairs()]
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}, indent=1), "utf-8")
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    for name, delimiter, encoding in (("c.csv", ",", "utf-8-sig"), ("d.csv", ";", "utf-8"), ("e.tsv", "\t", "utf-16")):
        with open(tmp_path / name, "w", encoding=encoding, newline="") as handle:
            table = csv.DictWriter(handle, ["prompt", "completion"], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    book = openpyxl.Workbook()
    for row in [["prompt", "completion"], *(list(row.values()) for row in rows)]:
        book.active.append(row)
    book.save(tmp_path / "f.xlsx")
    for file in sorted(tmp_path.iterdir()):
        assert written(prepare(file, fix="all")) == rows, file.name
    text = tmp_path / "g.txt"
    text.write_text("".join(f"{i} of {i * i}.\n" for i in range(12)), "utf-8")
    assert prepare(text).task == "open-ended"
    assert written(prepare(text, fix="all"))[3] == {"prompt": "", "completion": " 3 of 9."}


def test_unknown_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        prepare(tmp_path / "missing.jsonl")
    (tmp_path / "rows.doc").write_bytes(b"")
    with pytest.raises(DataError, match="does not tell its format"):
        prepare(tmp_path / "rows.doc")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(pairs()))
    names = [sorted(path.name for path in prepare(file, fix="all", split="random").outputs.values()) for _ in range(2)]
    assert names == [["rows_prepared_train.jsonl", "rows_prepared_valid.jsonl"],
                     ["rows_prepared_train (1).jsonl", "rows_prepared_valid (1).jsonl"]]


def authored(count: int = 100) -> list[dict[str, Any]]:
    return [{**row, "author": f"a{i % 10}", "date": f"2024-01-{1 + i % 28:02d}"} for i, row in enumerate(pairs(count))]


@pytest.mark.parametrize(("split", "by"), [("random", None), ("stratified", None), ("grouped", "author"),
                                           ("time", "date")])
def test_splits_keep_what_they_promise(tmp_path: Path, split: str, by: str | None) -> None:
    file = tmp_path / "rows.jsonl"
    rows = authored()
    file.write_bytes(jsonl(rows))
    result = prepare(file, fix="all", split=split, by=by)
    train, valid = written(result), written(result, "valid")
    assert len(train) + len(valid) == 100 and len(valid) == 20
    assert valid == written(prepare(file, fix="all", split=split, by=by), "valid")
    origin = {row["prompt"]: row for row in rows}
    if split == "stratified":
        assert sum(row["completion"] == " hockey" for row in valid) == 10
    if by:
        ours, theirs = ({origin[row["prompt"]][by] for row in part} for part in (train, valid))
        assert max(ours) <= min(theirs) if split == "time" else not ours & theirs
    assert ("group_overlap" in codes(result)) == (split != "grouped")


@pytest.mark.parametrize("split", ["random", "stratified"])
def test_a_split_keeps_copies_together(tmp_path: Path, split: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(pairs() * 3))
    result = prepare(file, fix=["extra_columns"], split=split)
    sides = [{row["prompt"] for row in written(result, part)} for part in ("train", "valid")]
    assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 30
    file.write_bytes(jsonl(pairs(1) * 30))
    with pytest.raises(DataError, match="that differ"):
        prepare(file, split=split)


def test_a_fix_that_makes_a_line_too_long_for_the_service_is_noticed(tmp_path: Path) -> None:
    rows = [{**row, "prompt": row["prompt"].removesuffix("\n\n###\n\n")} for row in pairs()]
    spare = examples.MAX_LINE - len(jsonl([{**rows[5], "prompt": ""}]))
    rows[5]["prompt"] = "x y " * (spare // 4)  # at most three bytes less than fit
    rows[4]["prompt"] += "\nand a line, so that the separator is one of lines, and longer"
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(rows))
    assert not examples.check(file).problems
    assert not prepare(file, fix=["prompt_separator"]).outputs
    result = prepare(file, fix=["prompt_separator", "too_long"])
    assert not examples.check(result.outputs["train"]).problems
    assert [row["reason"] for row in written(result, "set_aside")] == ["too_long"]


def test_more_than_a_service_takes_is_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs(120)
    size = len(b"".join(dump(row) for row in rows))
    monkeypatch.setattr("labkit.examples.findings.MAX_FILE", size)
    wider = [{**row, "note": "not trained on, so not written"} for row in rows]
    assert found(tmp_path, wider).keys() == {"extra_columns", "no_validation"}
    monkeypatch.setattr("labkit.examples.findings.MAX_FILE", size - 1)
    assert found(tmp_path, wider).keys() == {"extra_columns", "no_validation", "too_large"}
    monkeypatch.setattr("labkit.examples.findings.MAX_LINES", 119)
    assert "too_many" in found(tmp_path, rows) and "too_many" not in found(tmp_path, rows, model="gpt-4o-mini")


def test_a_large_file_is_read_alike_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    odd = [chats()[4], CASES["near_duplicates"][-1], {"messages": []}, *chat_of(("user", "a@example.org"))]
    file.write_bytes(jsonl(chats(4_500) + odd + chats(60)[40:]))
    alone = prepare(file)
    monkeypatch.setattr("labkit.examples.scan.LARGE", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    several = prepare(file)
    assert several.as_dict() == alone.as_dict() and (several.tokens == alone.tokens).all()
    assert {"duplicates", "malformed", "no_assistant", "near_duplicates"} <= codes(several).keys()
    assert not [child for child in psutil.Process().children() if "popen_loky" in " ".join(child.cmdline())]


def test_overlap_with_a_validation_file(tmp_path: Path) -> None:
    train, valid = tmp_path / "t.jsonl", tmp_path / "v.jsonl"
    near = {"messages": [{"role": "user", "content": "What is 7919 in words?  The 1th time"},
                         {"role": "assistant", "content": "number 1 of 1 and 1"}]}
    train.write_bytes(jsonl(chats()))
    valid.write_bytes(jsonl([chats()[7], near, {**chats(50)[45]}]))
    assert {"overlap": 1, "near_overlap": 1}.items() <= codes(prepare(train, valid)).items()
    result = prepare(train, valid, fix="all")
    assert len(written(result)) == 28 and len(written(result, "valid")) == 3
    assert {row["reason"] for row in written(result, "set_aside")} == {"overlap", "near_overlap"}


def test_examples_that_share_an_instruction_are_not_alike(tmp_path: Path) -> None:
    lead = " ".join(f"rule {i} says that case {i * i} is for team {i % 7}" for i in range(20))
    rows = [{**pair, "prompt": f"{lead}. Now: {pair['prompt']}"} for pair in pairs(40)]
    again = {**rows[4], "prompt": rows[4]["prompt"].replace("saw", "Saw,")}
    assert found(tmp_path, [*rows, again])["near_duplicates"] == 1


def test_other_words_are_no_slips_of_the_pen(tmp_path: Path) -> None:
    def labelled(rare: str, often: str) -> list[dict[str, Any]]:
        return [{**pair, "completion": f" {rare if i % 40 == 0 else often}"} for i, pair in enumerate(pairs(200))]

    for rare, often in (("irrelevant", "relevant"), ("group 12", "group 11")):
        assert "label_spelling" not in found(tmp_path, labelled(rare, often))
    assert found(tmp_path, labelled("relevent", "relevant"))["label_spelling"] == 5


def test_validation_gets_the_separator_of_training(tmp_path: Path) -> None:
    train, valid = tmp_path / "t.jsonl", tmp_path / "v.jsonl"
    train.write_bytes(jsonl(pairs()))
    valid.write_bytes(jsonl([{"prompt": f"where {i}?", "completion": "hockey"} for i in range(3)]))
    assert written(prepare(train, valid, fix="all"), "valid")[1] == {
        "prompt": "where 1?\n\n###\n\n", "completion": " hockey"}


def test_conversion_there_and_back(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(pairs()))
    chat = prepare(file, fix="all", to="chat")
    asked = pairs()[1]["prompt"].removesuffix("\n\n###\n\n")
    asked = pairs()[1]["prompt"].removesuffix("\n\n###\n\n")
    assert written(chat)[1] == {"messages": [{"role": "user", "content": asked},
                                             {"role": "assistant", "content": "hockey"}]}
    assert written(prepare(chat.outputs["train"], fix="all", to="completion")) == pairs()


def test_preferences_and_tools_are_for_hosted_models(tmp_path: Path) -> None:
    rows = [{"input": {"messages": [{"role": "user", "content": f"say {i} and {i * i}"}]},
             "preferred_output": [{"role": "assistant", "content": f"{i}"}],
             "non_preferred_output": [{"role": "assistant", "content": "no"}]} for i in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(rows))
    assert not prepare(file, fix="all").fit
    hosted = prepare(file, fix="all", model="gpt-4.1-mini-2025-04-14")
    assert hosted.fit and hosted.form == "preference" and written(hosted) == rows
    assert '"type": "dpo"' in hosted.as_dict()["next"]


def test_labels_given_are_the_list(tmp_path: Path) -> None:
    assert found(tmp_path, pairs(), labels=["baseball", "hokey"])["label_spelling"] == 15
    assert found(tmp_path, pairs(), labels=["baseball"])["off_list"] == 15


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl([*changed(3, completion="hockey"), pairs()[0]]))
    assert main(["prepare", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"code", "severity", "count", "lines", "message", "fix"} <= said["findings"][0].keys()
    assert next(f["lines"] for f in said["findings"] if f["code"] == "completion_space") == [4]

    assert main(["prepare", str(file), "--dry-run"]) == 0
    assert '+ {"prompt"' in capsys.readouterr().out and list(tmp_path.iterdir()) == [file]

    answers = iter(["n", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert main(["prepare", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "client.fine_tuning.jobs.create(" in shown
    rows = [json.loads(line) for line in (tmp_path / "rows_prepared.jsonl").read_bytes().splitlines()]
    assert len(rows) == 31 and rows[3] == pairs()[3]  # the duplicate was kept, the space added

    assert main(["prepare", str(file), "--fix", "duplicates"]) == 0
    assert len((tmp_path / "rows_prepared (1).jsonl").read_bytes().splitlines()) == 30
    file.write_bytes(jsonl(pairs(5)))
    assert main(["prepare", str(file), "--yes"]) == 1
    assert main(["prepare", str(tmp_path / "none.jsonl"), "--yes"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", str(file), "--split", "odd"])


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    run = subprocess.run([sys.executable, "-m", "labkit", "prepare", str(file), "--json"], capture_output=True)
    assert run.returncode == 1 and json.loads(run.stdout)["fit"] is False


def test_the_reports(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(changed(3, completion=" <b>hockey</b>")))
    result = prepare(file)
    panel = result._repr_html_()
    assert "Tokens of an example" in panel and "Labels" in panel and "<b>hockey</b>" not in panel
    assert "label_spelling" in str(result) or "off_list" in str(result)
    assert sum(count for *_, count in histogram(result.tokens)) == result.examples


def test_tokens_are_those_of_the_whole_chat(tmp_path: Path) -> None:
    rows = [*chats(3), *chat_of(("system", "Be brief."), ("user", " x"), ("assistant", "y"))[30:], *pairs(2)]
    parsed = [examples.parse(row) for row in rows]
    counted = list(TokenCounter(None)(parsed))  # type: ignore[arg-type]
    for row, count in zip(rows[:4], counted, strict=False):
        assert count == tokens.count(tokens.render(row["messages"], header=False))
    assert counted[-1] == sum(tokens.count(text) for text in rows[-1].values()) + 1
