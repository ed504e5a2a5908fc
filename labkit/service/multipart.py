"""A multipart/form-data body as it arrives: its file goes to the disk in pieces, its fields to memory."""

from pathlib import Path
from types import TracebackType

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from labkit.service.errors import ApiError, bad_request
from labkit.service.objects import new_id

FIELDS_LIMIT = 64 << 10  # bytes of all fields and headers together


class Upload:
    """Reads one body. `fields` has the small parts; `path` the file part, which was called `filename`.

    The file part must be called `part`. As a context manager it removes the file at the end unless
    it was moved away.
    """

    def __init__(self, content_type: str, folder: Path, limit: int, part: str = "file") -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise bad_request("An upload is sent as multipart/form-data with a boundary.", part, "invalid_body")
        try:
            self._parser = MultipartParser(options[b"boundary"], {
                "on_header_field": self._on_header_field, "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end, "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data, "on_part_end": self._on_part_end, "on_end": self._on_end,
            })
        except FormParserError as error:
            raise _malformed() from error
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.path = folder / new_id("upload-")
        self.size = 0
        self._part, self._limit, self._small = part, limit, 0
        self._file = open(self.path, "wb")  # noqa: SIM115 - closed by finish or __exit__
        self._headers: dict[bytes, bytes] = {}
        self._header = self._value = b""
        self._name: str | None = None  # of the field that is being read; None within the file
        self._field = b""
        self._whole = False

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self._file.close()
        finally:  # closing flushes, which a full disk refuses
            self.path.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        """Take in the next piece of the body."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _malformed() from error

    def finish(self) -> None:
        """Say that the body is whole."""
        try:
            self._parser.finalize()
        except FormParserError as error:
            raise _malformed() from error
        if not self._whole:
            raise _malformed()
        self._file.close()

    # --- what the parser finds ---------------------------------------------------------------

    def _count(self, size: int) -> None:
        self._small += size
        if self._small > FIELDS_LIMIT:
            raise ApiError(413, f"The fields beside the file are larger than {FIELDS_LIMIT >> 10} KB together.",
                           "request_too_large")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._headers = {}
        if b"name" not in options:
            raise _malformed()
        name = options[b"name"].decode(errors="replace")
        self._field = b""
        if b"filename" not in options:
            self._name = name
            return
        if name != self._part or self.filename is not None:
            raise bad_request(f"This request has one file part, called '{self._part}'.", name, "unknown_parameter")
        self.filename, self._name = base_name(options[b"filename"].decode(errors="replace")), None

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is not None:
            self._count(end - start)
            self._field += data[start:end]
            return
        self.size += end - start
        if self.size > self._limit:
            raise ApiError(413, f"The {self._part} is larger than {self._limit >> 20} MB. Split it.", "file_too_large",
                           self._part)
        self._file.write(data[start:end])

    def _on_part_end(self) -> None:
        if self._name is not None:
            self.fields[self._name] = self._field.decode(errors="replace")

    def _on_end(self) -> None:
        self._whole = True  # the closing boundary was there


def base_name(filename: str) -> str:
    """A file's name as it is shown: without folders, at most 255 characters."""
    return filename.replace("\\", "/").rsplit("/", 1)[-1][:255] or "upload"


def _malformed() -> ApiError:
    return bad_request("The multipart body is malformed or not whole.", code="invalid_body")
