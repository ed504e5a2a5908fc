"""Reads JSONL, JSON, CSV, TSV, XLSX and TXT, one row at a time: a file may be larger than memory.

`lines` yields each line's number and content; `decoded` makes a row of it, or a `Problem` where it
cannot be read and what stood there, so that it can be set aside. A UTF-16 file is recognised and decoded.
"""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from labkit.errors import DataError
from labkit.examples.rows import BOM, MAX_LINE, Problem, decode, nested_too_deep, too_deep, too_long

Line = tuple[int, Any]  # number (1-based), and what stands there: see `decoded`
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".txt")
BLOCK = 1 << 20  # characters read at a time from a JSON file


def lines(path: Path, repair: frozenset[str] = frozenset()) -> Iterator[Line]:
    """Each row of a file, for `decoded`. `repair` names the kinds of problem to mend: not_utf8, null_bytes, bom.

    Raises `DataError` for a file that is missing or has an unknown ending, `OSError` if reading fails.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}. Check the name.")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise DataError(f"{path.name} ends in {ending or 'nothing'}, which does not tell its format. "
                        f"Rename it to one of {', '.join(ENDINGS)}.")
    if ending == ".xlsx":
        return _xlsx(path)
    with open(path, "rb") as handle:
        utf16 = handle.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    raw = _transcoded(path) if utf16 else _binary_lines(path)
    if ending in (".jsonl", ".ndjson"):
        return ((number, line) for number, line in enumerate(raw, 1) if line.strip())
    text = _text(raw, repair)
    if ending == ".json":
        return _json(text)
    if ending == ".txt":
        return ((number, _or_raw(_sound({"prompt": "", "completion": line.rstrip("\r\n")}, number), line))
                for number, line in enumerate(text, 1) if line.strip())
    return _table(text, "\t" if ending == ".tsv" else ",")


def first_bytes_problem(path: Path) -> Problem | None:
    """A byte-order mark, or another encoding than UTF-8, which hosted providers stumble over."""
    with open(path, "rb") as handle:
        begin = handle.read(3)
    if path.suffix.lower() == ".xlsx":
        return None
    if begin[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return Problem(1, "column 1", "The file is UTF-16, not UTF-8.", "It is read, and written as UTF-8.",
                       kind="utf16")
    if begin == BOM:
        return Problem(1, "column 1", "The file begins with a byte-order mark.", "It is written without.", kind="bom")
    return None


def _binary_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as handle:
        for number, raw in enumerate(handle):
            yield raw if number else raw.removeprefix(BOM)


def _transcoded(path: Path) -> Iterator[bytes]:
    """The lines of a UTF-16 file as UTF-8."""
    with open(path, encoding="utf-16", errors="replace", newline="\n") as handle:
        for line in handle:
            yield line.encode("utf-8", "replace")


def decoded(number: int, content: Any, repair: frozenset[str]) -> tuple[Any, str]:
    """The row of a line, or a `Problem` and the text that stood there, so that it can be set aside.

    Lines of JSON come from `lines` as bytes, to be decoded by whoever needs them; all others are rows
    already, or a `Problem` with its text.
    """
    if isinstance(content, tuple):
        return content
    if not isinstance(content, bytes):
        return content, ""
    row = too_long(number) if len(content) > MAX_LINE else decode(content, number)
    if not isinstance(row, Problem):
        return row, ""
    if row.kind in repair:
        content = _repaired(content, repair)
        row = decode(content, number) if content.strip() else Problem(
            number, "", "The line held nothing else.", "Remove it.", kind="invalid_json")
    return row, content.decode("utf-8", "backslashreplace") if isinstance(row, Problem) else ""


def _or_raw(row: Any, raw: str) -> Any:
    return (row, raw) if isinstance(row, Problem) else row


def _repaired(raw: bytes, repair: frozenset[str]) -> bytes:
    if "bom" in repair:
        raw = raw.removeprefix(BOM)
    if "null_bytes" in repair:
        raw = raw.replace(b"\x00", b"")
    if "not_utf8" in repair:
        try:
            raw.decode()
        except UnicodeDecodeError:
            raw = raw.decode("cp1252", "replace").encode()  # what Windows programs write
    return raw


def _text(lines: Iterator[bytes], repair: frozenset[str]) -> Iterator[str]:
    """Lines as text; a byte that is not UTF-8 becomes a lone surrogate, which `_sound` finds."""
    for raw in lines:
        yield (_repaired(raw, repair) if repair else raw).decode("utf-8", "surrogateescape")


def _sound(row: Any, number: int) -> Any:
    """The row, or the problem with its characters."""
    for name, value in row.items():
        if isinstance(value, str) and not value.isascii() and any("\udc80" <= sign <= "\udcff" for sign in value):
            return Problem(number, str(name), "The text is not UTF-8.", "Save the file as UTF-8.", kind="not_utf8")
    if too_deep(row):
        return nested_too_deep(number)
    return too_long(number) if len(dump(row)) > MAX_LINE else row


def _table(lines: Iterator[str], delimiter: str) -> Iterator[Line]:
    """Rows of CSV or TSV by the names in its first line; `;` is taken where the first line has no comma."""
    first = next(lines, "")
    if delimiter == "," and "," not in first and ";" in first:
        delimiter = ";"
    before = csv.field_size_limit(1 << 30)
    try:
        reader = csv.reader(_chain(first, lines), delimiter=delimiter)
        try:
            names = _names(next(reader, []))
        except csv.Error as error:
            yield 1, Problem(1, "", f"The line of column names cannot be read: {error}.",
                             "Save the table as CSV anew, with line feeds.", kind="invalid_row")
            return
        while True:
            number = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, Problem(number, "", f"The row cannot be read: {error}.", "Mend its quotes.",
                                      kind="invalid_row")
                continue
            if any(value.strip() for value in values):
                yield _row(names, values, number, delimiter)
    finally:
        csv.field_size_limit(before)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _names(cells: list[str]) -> list[str]:
    return [name.strip() or f"column {index}" for index, name in enumerate(cells, 1)]


def _row(names: list[str], values: list[str], number: int, delimiter: str) -> Line:
    raw = delimiter.join(values)
    if len(values) != len(names):
        problem = Problem(number, "", f"The row has {len(values)} cells, but the first line names {len(names)}.",
                          "Put text that holds the delimiter in double quotes.", kind="invalid_row")
        return number, (problem, raw)
    row = _sound({name: _cell(value) for name, value in zip(names, values, strict=True)}, number)
    return number, _or_raw(row, raw)


def _cell(value: str) -> Any:
    """A cell that holds a JSON list (a chat's messages) is unpacked; all else is text."""
    if value.startswith("[{"):
        try:
            return orjson.loads(value)
        except ValueError:
            return value
    return value


def _json(lines: Iterator[str]) -> Iterator[Line]:
    """The objects of a JSON list, or objects one after another; a list inside one object is unwrapped."""
    decoder, buffer, line, ended, listed = json.JSONDecoder(), "", 1, False, False
    want = BLOCK
    while True:
        while len(buffer) < want and not ended:
            piece = next(lines, None)
            ended, buffer = piece is None, buffer + (piece or "")
        clean = buffer.lstrip(" \t\r\n,[" if not listed else " \t\r\n,")
        skipped = buffer[:len(buffer) - len(clean)]
        line, listed, buffer = line + skipped.count("\n"), listed or "[" in skipped, clean
        if not buffer or (ended and not buffer.strip(" \t\r\n]")):
            if ended:
                return
            continue
        try:
            value, end = decoder.raw_decode(buffer)
        except (ValueError, RecursionError) as error:
            if not ended:  # the object may go on
                want = 2 * len(buffer)
                continue
            at = getattr(error, "pos", 0)
            here = line + buffer[:at].count("\n")
            yield here, (Problem(
                here, f"column {at - buffer.rfind(chr(10), 0, at)}",
                "The JSON is not valid from here on.", "Mend it, or write one object a line (JSONL).",
                kind="invalid_json"), buffer.encode("utf-8", "backslashreplace").decode())
            return
        if not ended and end == len(buffer):  # a number, for one, may go on
            want = 2 * len(buffer)
            continue
        for row in _unwrapped(value):
            yield line, _sound(row, line) if isinstance(row, dict) else row
        line, buffer, want = line + buffer[:end].count("\n"), buffer[end:], BLOCK


def _unwrapped(value: Any) -> list[Any]:
    if isinstance(value, dict) and not {"messages", "prompt", "completion", "input"} & value.keys():
        lists = [inside for inside in value.values()
                 if isinstance(inside, list) and inside and isinstance(inside[0], dict)]
        if len(lists) == 1:
            return lists[0]
    return [value]


def _xlsx(path: Path) -> Iterator[Line]:
    """Rows of the first sheet by the names in its first row."""
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            rows = book.worksheets[0].iter_rows(values_only=True)
            names = _names(["" if value is None else str(value) for value in next(rows, ())])
            for number, values in enumerate(rows, 2):
                if any(value is not None for value in values):
                    row = dict(zip(names, ("" if value is None else _cell(str(value)) for value in values),
                                   strict=False))
                    yield number, row
        finally:
            book.close()
    except Exception as error:  # a damaged archive or sheet: openpyxl, zipfile and the XML parser each raise their own
        yield 1, Problem(1, "", f"The workbook cannot be read ({type(error).__name__}: {error!s:.80}).",
                         "Save it again as .xlsx, or as CSV.", kind="invalid_row")


def dump(row: Any) -> bytes:
    """One line of JSONL, with its line end."""
    try:
        return orjson.dumps(row) + b"\n"
    except TypeError:  # an integer of more than 64 bits, half of a surrogate pair
        return json.dumps(row).encode() + b"\n"
