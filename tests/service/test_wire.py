"""What every request passes: keys, hosts, one error shape, request ids, logs without secrets."""

import http.client
import json
import os
import socket
from urllib.parse import urlsplit

import openai
import pytest

from tests.conftest import RunningService, wait_until


def send(service: RunningService, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict, dict]:
    """A request that no SDK would send: status, reply and headers."""
    address = urlsplit(service.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)
    sent = {"Authorization": f"Bearer {service.key}", "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read()), dict(reply.getheaders())


FORM = (b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\ncontent\r\n--x--\r\n')
CASES = [
    ("GET", "/v1/nothing", b"", {}, 404, "unknown_url"),
    ("GET", "/files", b"", {}, 404, "unknown_url"),
    ("GET", "/v1/files/", b"", {}, 404, "unknown_url"),
    ("PUT", "/v1/files", b"", {}, 405, "method_not_allowed"),
    ("POST", "/v1/completions", b"{", {}, 400, "invalid_json"),
    ("POST", "/v1/completions", b"[]", {}, 400, "invalid_json"),
    ("POST", "/v1/completions", b"", {}, 400, "invalid_json"),
    ("POST", "/v1/completions", b"{}", {"Content_Type": "text/plain"}, 400, "invalid_json"),
    ("POST", "/v1/completions", b"{}", {}, 400, "missing_required_parameter"),
    ("POST", "/v1/completions", b'{"a":' * 5000, {}, 400, "invalid_json"),
    ("POST", "/v1/completions", b'{"a":' * 65 + b"1" + b"}" * 65, {}, 400, "invalid_json"),
    ("POST", "/v1/completions", b'{"model": "tiny-llama", "prompt": "\\ud800"}', {}, 400, "invalid_value"),
    ("POST", "/v1/completions", b'{"model": "tiny-llama", "temperature": NaN}', {}, 400, "invalid_value"),
    ("POST", "/v1/completions", b'{"model": "tiny-llama", "stop": "%s"}' % (b"x" * 1001), {}, 400, "invalid_value"),
    ("POST", "/v1/files", b"{}", {}, 400, "invalid_body"),
    ("POST", "/v1/files", b"no parts", {"Content_Type": "multipart/form-data; boundary=x"}, 400, "invalid_body"),
    ("POST", "/v1/files", FORM[:-6], {"Content_Type": "multipart/form-data; boundary=x"}, 400, "invalid_body"),
    ("POST", "/v1/files", FORM, {"Content_Type": "multipart/form-data; boundary=" + "x" * 300}, 400, "invalid_body"),
    ("POST", "/v1/files", FORM.replace(b"user_data", b""), {"Content_Type": "multipart/form-data; boundary=x"}, 400,
     "invalid_value"),
    ("GET", "/v1/models", b"", {"Authorization": "Bearer wrong"}, 401, "invalid_api_key"),
    ("GET", "/v1/nothing", b"", {"Authorization": ""}, 401, "invalid_api_key"),
    ("GET", "/v1/models", b"", {"Host": "evil.example:80"}, 403, "host_refused"),
]


@pytest.mark.parametrize("method, path, body, headers, status, code", CASES)
def test_every_error_has_one_shape(
    service: RunningService, method: str, path: str, body: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    got, reply, received = send(service, method, path, body, **headers)
    assert (got, set(reply), set(reply["error"])) == (status, {"error"}, {"message", "type", "param", "code"})
    assert reply["error"]["type"] == "invalid_request_error" and reply["error"]["message"].endswith((".", "}"))
    assert code is None or reply["error"]["code"] == code
    assert "Traceback" not in json.dumps(reply)
    assert received["x-request-id"].startswith("req_")


def test_a_form_written_by_hand_is_taken(service: RunningService) -> None:
    status, reply, _ = send(service, "POST", "/v1/files", FORM, Content_Type='Multipart/Form-Data; boundary="x"')
    assert (status, reply["bytes"], reply["filename"]) == (200, 7, "a")


def test_a_body_that_is_too_large_is_refused(service: RunningService) -> None:
    status, reply, _ = send(service, "POST", "/v1/completions", b" " * (33 << 20))
    assert (status, reply["error"]["code"]) == (413, "request_too_large")


def test_a_wrong_key_is_an_authentication_error(service: RunningService) -> None:
    with pytest.raises(openai.AuthenticationError, match="api_key") as error:
        openai.OpenAI(base_url=service.url, api_key="sk-wrong", max_retries=0).models.list()
    assert error.value.code == "invalid_api_key"


def test_an_answers_line_stands_in_the_log_when_it_arrives(service: RunningService) -> None:
    begin, ids = service.log_file.stat().st_size, set()
    for _ in range(300):
        _, _, received = send(service, "GET", "/v1/models")
        with open(service.log_file, "rb") as log:
            log.seek(begin)
            assert received["x-request-id"] in log.read().decode()
        ids.add(received["x-request-id"])
    assert len(ids) == 300


def test_the_log_holds_no_key_and_no_text(service: RunningService) -> None:
    service.client.completions.create(model="tiny-llama", prompt="a very secret prompt", max_tokens=1)
    send(service, "POST", "/v1/completions", b'{"model": "tiny-llama", "prompt": "a very secret prompt", "bad": 1}')
    send(service, "GET", f"/v1/models/{service.key}")  # as when a key is pasted into the base URL
    logged = service.log_file.read_text()
    assert service.key not in logged and "secret" not in logged and '"path": "/v1/completions"' in logged


def test_an_endless_name_of_a_model_is_neither_logged_nor_stored(service: RunningService) -> None:
    body = json.dumps({"model": "gpt-4o" + "x" * 100_000, "training_file": "file-none"}).encode()
    status, reply, _ = send(service, "POST", "/v1/fine_tuning/jobs", body)
    assert (status, reply["error"]["code"]) == (400, "model_not_available")
    assert max(map(len, service.log_file.read_text().splitlines())) < 10_000


def test_a_client_that_leaves_during_an_upload_is_no_fault_of_the_service(service: RunningService) -> None:
    address, errors = urlsplit(service.url), len(service.log("error"))
    gone = len([entry for entry in service.log("request") if entry["status"] == 499])
    head = (f"POST /v1/files HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {service.key}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n\r\n")
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        connection.sendall(head.encode() + FORM[:50])
    wait_until(lambda: len([entry for entry in service.log("request") if entry["status"] == 499]) > gone)
    assert len(service.log("error")) == errors
    assert not list((service.home / "incoming").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such bits; files have the rights of the user's data folder")
def test_the_key_is_readable_by_its_owner_only(service: RunningService) -> None:
    path = service.home / "api_key"
    assert path.read_text().strip() == service.key and service.key.startswith("sk-local-")
    assert path.stat().st_mode & 0o077 == 0
    for content in service.home.glob("service.db*"):
        assert content.stat().st_mode & 0o077 == 0 and service.key.encode() not in content.read_bytes()
    assert (service.home / "files").stat().st_mode & 0o077 == 0


def test_no_web_page_may_call_unless_configured(service: RunningService) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "GET"}
    for method, headers in (("OPTIONS", {**asked, "Authorization": ""}), ("GET", asked)):
        _, _, received = send(service, method, "/v1/models", **headers)
        assert not [name for name in received if name.lower().startswith("access-control")]


def test_models_and_aliases(client: openai.OpenAI) -> None:
    assert "tiny-llama" in [model.id for model in client.models.list()]
    alias = client.models.retrieve("gpt-4o-mini-2024-07-18")
    assert (alias.id, alias.owned_by, alias.root) == ("gpt-4o-mini-2024-07-18", "local", "tiny-llama")  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="tiny-llama") as error:
        client.models.retrieve("claude")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny-llama")
