"""A batch's files: the requests that it reads, and the answers that it writes.

What is answered stands in the answers' files and nowhere else, so a batch that is taken up again
after a crash knows from them which requests are still to be sent.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from openai.types import BatchUsage

from labkit.service import objects
from labkit.service.gate import BODY_LIMIT
from labkit.service.objects import Body

MAX_REQUESTS = 50_000  # of one batch, as at OpenAI
MAX_ERRORS = 100  # listed of a batch that fails
MAX_CUSTOM_ID = 512  # characters
MAX_NAME = 512  # characters of a model's or a parameter's name, which a batch shows and its errors repeat
MISSING = "missing_required_parameter"


@dataclass(frozen=True)
class Line:
    """Where a request stands in the input file, in bytes."""

    custom_id: str
    offset: int
    size: int


@dataclass
class Input:
    """What was found in an input file: its requests, or `errors` as the API lists them."""

    lines: list[Line] = field(default_factory=list)
    errors: list[Body] = field(default_factory=list)
    model: str | None = None


def check(path: Path, endpoint: str) -> Input:
    """Read the requests of an input file, all of which must be for `endpoint` and for one model."""
    found, seen, offset = Input(), set[str](), 0

    def wrong(code: str, message: str, param: str | None = None, line: int | None = None) -> None:
        found.errors.append({"code": code, "message": message, "param": param, "line": line})

    with open(path, "rb") as handle:
        number = 0
        while (raw := handle.readline(BODY_LIMIT + 1)) and len(found.errors) < MAX_ERRORS:
            number += 1
            place, offset = offset, offset + len(raw)
            if len(raw) > BODY_LIMIT:
                wrong("line_too_large", f"The line is longer than {BODY_LIMIT >> 20} MB.", line=number)
                break
            if not raw.strip():
                continue
            if len(found.lines) == MAX_REQUESTS:
                wrong("too_many_requests", f"A batch has at most {MAX_REQUESTS:,} requests. Split the file.")
                break
            request = _parsed(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
            problem = _problem(request, endpoint, seen, found.model)
            if problem:
                wrong(*problem, line=number)
                continue
            found.model = request["body"]["model"]
            seen.add(request["custom_id"])
            found.lines.append(Line(request["custom_id"], place, len(raw)))
    if not found.lines and not found.errors:
        wrong("empty_file", "The input file has no requests. Write one JSON object a line.")
    return found


def body_of(path: Path, line: Line) -> bytes:
    """The body of a request that `check` has found, as JSON."""
    with open(path, "rb") as handle:
        handle.seek(line.offset)
        return json.dumps(_parsed(handle.read(line.size).removeprefix(b"\xef\xbb\xbf"))["body"]).encode()


def _parsed(raw: bytes) -> Any:
    """A line's JSON; None if it is none, or holds what no reply could repeat."""
    try:
        value = json.loads(raw)
        json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
        return value
    except (ValueError, RecursionError):  # ValueError: half a character, or a number of thousands of digits, too
        return None


def _problem(request: Any, endpoint: str, seen: set[str], model: str | None) -> tuple[str, str, str | None] | None:
    """Code, message and parameter of what is wrong with a request."""
    if not isinstance(request, dict):
        return ("invalid_json_line", "The line is not a JSON object of whole characters. Each line must be one, such "
                "as {\"custom_id\": \"1\", \"method\": \"POST\", \"url\": \"" + endpoint + "\", \"body\": {…}}.", None)
    for name in ("custom_id", "method", "url", "body"):
        if name not in request:
            return MISSING, f"Missing required parameter: '{name}'.", name
    if unknown := sorted(request.keys() - {"custom_id", "method", "url", "body"}):
        name = unknown[0][:MAX_NAME]
        return "unknown_parameter", f"Unknown parameter: '{name}'.", name
    id, body = request["custom_id"], request["body"]
    if not isinstance(id, str) or not 1 <= len(id) <= MAX_CUSTOM_ID:
        return "invalid_custom_id", f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID} characters.", "custom_id"
    if id in seen:
        return "duplicate_custom_id", "This 'custom_id' stands in an earlier line. Each must be unique.", "custom_id"
    if request["method"] != "POST":
        return "invalid_method", "'method' must be \"POST\".", "method"
    if request["url"] != endpoint:
        return "invalid_url", f"'url' must be the endpoint of the batch, \"{endpoint}\".", "url"
    return _body_problem(body, model)


def _body_problem(body: Any, model: str | None) -> tuple[str, str, str | None] | None:
    if not isinstance(body, dict):
        return "invalid_type", "'body' must be an object.", "body"
    if not isinstance(body.get("model"), str):
        return MISSING, "Missing required parameter: 'body.model', the name of a model.", "body.model"
    if len(body["model"]) > MAX_NAME:
        return "invalid_value", f"A model's name has at most {MAX_NAME} characters.", "body.model"
    if model is not None and body["model"] != model:
        return ("mismatched_model", f"All requests of a batch are for one model, and the first is for '{model}'. Make "
                "a batch for each model.", "body.model")
    if body.get("stream"):
        return "unsupported_parameter", "Answers of a batch are not streamed. Leave out 'stream'.", "body.stream"
    return None


class Results:
    """The answers of a batch so far, in its folder; opening it drops a last line that is not whole."""

    def __init__(self, folder: Path) -> None:
        self.output, self.errors = folder / "output.jsonl", folder / "errors.jsonl"
        self.answered: set[str] = set()
        self.completed = self.failed = 0
        self._read = self._cached = self._written = 0  # tokens
        self._files: dict[Path, BinaryIO] = {}
        for path in (self.output, self.errors):
            for entry in _whole_lines(path):
                self._count(entry, path == self.output)
            self._files[path] = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close

    def add(self, custom_id: str, response: Body | None, error: Body | None = None) -> None:
        """Write an answer, or why there is none."""
        entry = {"id": objects.new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": error}
        good = response is not None and response["status_code"] < 300
        line = memoryview(json.dumps(entry).encode() + b"\n")
        handle = self._files[self.output if good else self.errors]
        while line:
            line = line[handle.write(line):]
        self._count(entry, good)

    def sync(self) -> None:
        """See that what was added is on the disk."""
        for handle in self._files.values():
            os.fsync(handle.fileno())

    def close(self) -> None:
        """Close the files."""
        for handle in self._files.values():
            handle.close()

    def usage(self) -> Body:
        """What all answers cost together."""
        return objects.made(
            BatchUsage, input_tokens=self._read, input_tokens_details={"cached_tokens": self._cached},
            output_tokens=self._written, output_tokens_details={"reasoning_tokens": 0},
            total_tokens=self._read + self._written)

    def _count(self, entry: Body, good: bool) -> None:
        self.answered.add(entry["custom_id"])
        self.completed, self.failed = self.completed + good, self.failed + (not good)
        if not good:
            return
        usage = entry["response"]["body"].get("usage") or {}  # responses and batches say "input" for "prompt"
        self._read += usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        self._written += usage.get("completion_tokens") or usage.get("output_tokens") or 0
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        self._cached += details.get("cached_tokens") or 0


def _whole_lines(path: Path) -> Iterator[Body]:
    """The entries of a file of answers; what a crash left behind them is cut off."""
    path.touch()
    whole = 0
    with open(path, "rb+") as handle:
        for raw in handle:
            entry = _parsed(raw) if raw.endswith(b"\n") else None
            if entry is None:
                break
            whole += len(raw)
            yield entry
        handle.truncate(whole)
