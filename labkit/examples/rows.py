"""One line of a training file -> a typed example, or what is wrong with it.

A learner's check before upload, `labkit prepare` and the service's validation of a job are this
same code, so they cannot disagree. Three forms are recognised, one JSON object a line (source:
OpenAI's fine-tuning guides): prompt/completion, chat `messages` whose assistant turns may carry
`weight` 0 or 1, and preference pairs. The first two can be trained here, without tools.
"""

import json
from dataclasses import dataclass
from typing import Any

import orjson

BOM = b"\xef\xbb\xbf"  # what Windows editors put before UTF-8
MINIMUM = 10  # examples; OpenAI refuses a job with fewer
MAX_LINE = 1 << 20  # bytes; the 65,536 tokens that OpenAI takes of an example are about a quarter of that in English
MAX_LINES = 100_000
MAX_FILE = 512 << 20  # bytes, as at OpenAI (OpenAPI specification of August 2026)
MAX_DEPTH = 64  # lists and objects within each other
ROLES = ("system", "developer", "user", "assistant")
TOOL_ROLES = ("tool", "function")  # hosted providers only
TOOL_KEYS = ("tools", "functions")
KEYS = {"completion": {"prompt", "completion"},
        "chat": {"messages", "tools", "functions", "parallel_tool_calls"},
        "preference": {"input", "preferred_output", "non_preferred_output"}}


@dataclass(frozen=True)
class Completion:
    """A prompt/completion example."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A chat example: messages of `role` and `content`; `trained[i]` tells whether message i is learned.

    `tools` tells that it defines or calls tools, whose calls stand in `content` as JSON.
    """

    messages: tuple[dict[str, str], ...]
    trained: tuple[bool, ...]
    tools: bool = False


@dataclass(frozen=True)
class Preference:
    """A preference pair (DPO): the conversation, the better answer and the worse one."""

    messages: tuple[dict[str, str], ...]
    preferred: str
    other: str
    tools: bool = False


Example = Completion | Chat


@dataclass(frozen=True)
class Problem:
    """What is wrong in a file, where, and how to mend it. `line` is 1-based, 0 for the file as a whole.

    `code` is what the API answers, `kind` the finding's name in `labkit prepare`.
    """

    line: int
    field: str
    message: str
    fix: str
    code: str = "invalid_training_file"
    kind: str = "malformed"

    def __str__(self) -> str:
        place = f"line {self.line}" + (f", {self.field}" if self.field else "") + ": " if self.line else ""
        return f"{place}{self.message} {self.fix}"


def decode(raw: bytes, line: int) -> Any:
    """The JSON value of one line, or a `Problem` with the column."""
    try:
        try:
            row = orjson.loads(raw)
        except ValueError:  # or it is one of the things that only Python's own reader takes, such as NaN
            row = json.loads(raw.decode())
        deep = raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and too_deep(row)
        return nested_too_deep(line) if deep else row
    except UnicodeDecodeError as error:
        return Problem(line, f"byte {error.start + 1}", "The line is not UTF-8 text.", "Save the file as UTF-8.",
                       kind="not_utf8")
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        column = f"column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        if b"\x00" in raw:
            return Problem(line, f"byte {raw.index(0) + 1}", "The line holds a null byte.",
                           "Remove it; it often comes from UTF-16 files.", kind="null_bytes")
        return Problem(
            line, column, "The line is not valid JSON.",
            "Every line must be one whole JSON object, such as {\"prompt\": \"…\", \"completion\": \" …\"}.",
            kind="invalid_json")


def too_long(line: int) -> Problem:
    """The problem of a line of more than `MAX_LINE` bytes."""
    return Problem(line, "", f"The line is longer than {MAX_LINE:,} bytes.",
                   "Write one example a line, and shorten this one.", kind="too_long")


def nested_too_deep(line: int) -> Problem:
    """The problem of a row nested more than `MAX_DEPTH` deep."""
    return Problem(line, "", f"The line is nested more than {MAX_DEPTH} levels deep.",
                   "Write one flat JSON object, such as {\"prompt\": \"…\", \"completion\": \" …\"}.")


def too_deep(value: Any) -> bool:
    """Whether lists and objects stand within each other more than `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level if isinstance(item, dict | list)
                 for child in (item.values() if isinstance(item, dict) else item) if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def auto_epochs(examples: int) -> int:
    """OpenAI's published rule: three epochs, more for tiny sets and fewer for huge ones.

    Source: openai-cookbook, examples/Chat_finetuning_data_prep.ipynb.
    """
    if examples * 3 < 100:
        return min(25, 100 // examples)
    if examples * 3 > 25_000:
        return max(1, 25_000 // examples)
    return 3


def parse(row: Any, line: int = 0) -> Example | Problem:
    """Turn one decoded line into an example that can be trained on here, or say what is wrong with it."""
    found = recognise(row, line)
    if isinstance(found, Preference):
        return Problem(line, "preferred_output", "Preference pairs cannot be trained on here.",
                       "Train this file at a hosted provider.", kind="hosted_only")
    if isinstance(found, Chat) and found.tools:
        where = next((key for key in TOOL_KEYS if row.get(key)), "messages")
        return Problem(line, where, f"\"{where}\" with tools cannot be trained on here yet.",
                       "Remove them, or train this file at a hosted provider.", kind="hosted_only")
    return found


def recognise(row: Any, line: int = 0) -> Completion | Chat | Preference | Problem:
    """Turn one decoded line into an example of any form that OpenAI trains on, or say what is wrong with it."""
    if not isinstance(row, dict):
        return not_an_object(row, line)
    if "preferred_output" in row or "non_preferred_output" in row:
        return _parse_preference(row, line)
    if "messages" in row:
        return _parse_chat(row, line)
    for name in ("prompt", "completion"):
        if name not in row:
            return Problem(line, name, f"The key \"{name}\" is missing (found: {', '.join(map(repr, row)) or 'none'}).",
                           "An example needs \"prompt\" and \"completion\", or \"messages\".", kind="missing_field")
        if not isinstance(row[name], str):
            return Problem(line, name, f"\"{name}\" is a JSON {_json_type(row[name])}, not a string.",
                           "Put the text in double quotes.", kind="not_text")
    if not row["completion"].strip():
        return Problem(line, "completion", "The completion is empty, so there is nothing to learn.",
                       "Fill it in or remove the line.", kind="empty_completion")
    return _clean_text(line, "prompt", row["prompt"]) or _clean_text(line, "completion", row["completion"]) \
        or Completion(row["prompt"], row["completion"])


def not_an_object(row: Any, line: int) -> Problem:
    """The problem of a row that is a list, a number or the like."""
    return Problem(line, "", f"The line is a JSON {_json_type(row)}, not an object.",
                   "Write {\"prompt\": …, \"completion\": …} or {\"messages\": […]}.", kind="not_an_object")


def _parse_chat(row: dict[str, Any], line: int) -> Chat | Problem:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return Problem(line, "messages", "\"messages\" must be a list with at least one message.",
                       "Write [{\"role\": \"user\", \"content\": …}, {\"role\": \"assistant\", \"content\": …}].")
    clean = _messages(messages, line, "messages")
    if isinstance(clean, Problem):
        return clean
    tools = any(row.get(key) for key in TOOL_KEYS) or any(map(_uses_tools, messages))
    trained = tuple(message["role"] == "assistant" and message.get("weight", 1) == 1 for message in messages)
    if not any(trained):
        return Problem(line, "messages", "No assistant message is trained on, so there is nothing to learn.",
                       "Add an assistant message, or give one \"weight\": 1.", kind="no_assistant")
    return Chat(tuple(clean), trained, tools)


def _parse_preference(row: dict[str, Any], line: int) -> Preference | Problem:
    form = "Write {\"input\": {\"messages\": […]}, \"preferred_output\": […], \"non_preferred_output\": […]}."
    given = row.get("input")
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list) or not given["messages"]:
        return Problem(line, "input.messages", "A preference pair needs the conversation before the answers.", form)
    clean = _messages(given["messages"], line, "input.messages")
    if isinstance(clean, Problem):
        return clean
    answers = []
    for key in ("preferred_output", "non_preferred_output"):
        if not isinstance(row.get(key), list) or len(row[key]) != 1:
            return Problem(line, key, f"\"{key}\" must be a list of one assistant message.", form)
        answer = _messages(row[key], line, key)
        if isinstance(answer, Problem):
            return answer
        if answer[0]["role"] != "assistant":
            return Problem(line, key, "The answer is not an assistant message.", form, kind="unknown_role")
        answers.append(answer[0]["content"])
    tools = bool(given.get("tools")) or any(map(_uses_tools, given["messages"]))
    return Preference(tuple(clean), answers[0], answers[1], tools)


def _messages(messages: list[Any], line: int, where: str) -> list[dict[str, str]] | Problem:
    """Role and content of each message; the first problem instead, if there is one."""
    clean = []
    for index, message in enumerate(messages):
        if problem := _message_problem(message, line, f"{where}[{index}]"):
            return problem
        content = message.get("content")
        if not isinstance(content, str):  # a call of tools instead of a text
            content = json.dumps(message.get("tool_calls") or message.get("function_call"))
        clean.append({"role": message["role"], "content": content})
    return clean


def _uses_tools(message: dict[str, Any]) -> bool:
    return bool(message["role"] in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"))


def _message_problem(message: Any, line: int, where: str) -> Problem | None:
    if not isinstance(message, dict):
        return Problem(line, where, f"The message is a JSON {_json_type(message)}, not an object.",
                       "Write {\"role\": …, \"content\": …}.")
    role, content = message.get("role"), message.get("content")
    if role not in (*ROLES, *TOOL_ROLES):
        return Problem(line, f"{where}.role", f"The role {role!r:.40} is not known here.",
                       f"Use one of {', '.join(ROLES)}.", kind="unknown_role")
    calls = role == "assistant" and (message.get("tool_calls") or message.get("function_call"))
    if not isinstance(content, str) and not (calls and content is None):
        return Problem(line, f"{where}.content", "The content must be a string.",
                       "Images and content parts cannot be trained on here.", kind="not_text")
    if role == "assistant" and not calls and not message["content"].strip():
        return Problem(line, f"{where}.content", "An assistant message is empty.", "Fill it in or remove it.",
                       kind="empty_completion")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        return Problem(line, f"{where}.weight", f"The weight {weight!r:.40} is not 0 or 1.",
                       "Use 1 to train on a message, 0 to show it only.", kind="weight")
    if "weight" in message and role != "assistant":
        return Problem(line, f"{where}.weight", "Only assistant messages carry a weight.", "Remove it.", kind="weight")
    return _clean_text(line, f"{where}.content", content) if isinstance(content, str) else None


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `Prompt`, `COMPLETION` … in lower case, where that does not hide another field."""
    known = {"prompt", "completion", "messages"}
    plain = {name: str(name).strip().lower() for name in row}
    return {plain[name] if plain[name] in known and plain[name] not in row else name: value
            for name, value in row.items()}


def order_problem(messages: tuple[dict[str, str], ...]) -> tuple[str, str] | None:
    """Where the roles of a chat come in an unusual order, and what is unusual; such a chat can be trained on."""
    before = ""
    for index, message in enumerate(messages):
        role = message["role"]
        if role in ("system", "developer") and before not in ("", "system", "developer"):
            return f"messages[{index}].role", "an instruction after the conversation has begun"
        if role == "assistant" and before in ("", "system", "developer"):
            return f"messages[{index}].role", "an answer before any question"
        if role == before and role in ("user", "assistant"):
            return f"messages[{index}].role", f"two {role} messages in a row"
        before = role
    return None


def _clean_text(line: int, where: str, text: str) -> Problem | None:
    if "\x00" in text:
        return Problem(line, where, "The text holds a null character.", "Remove it; it often comes from UTF-16 files.",
                       kind="null_bytes")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Problem(line, where, "The text holds half of a surrogate pair.", "Write the character itself.",
                       kind="not_utf8")
    return None


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
