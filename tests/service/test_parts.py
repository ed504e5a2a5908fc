"""Parts of the service on their own: the store, the scheduler's refusals, suffixes, hyperparameters, aliases."""

import asyncio
import socket
from pathlib import Path

import pytest

from labkit.errors import LabkitError, ServiceError
from labkit.service import objects, scheduler, worker
from labkit.service.calls import Call, Offsets, Sampling
from labkit.service.errors import ApiError
from labkit.service.models import Models, Weights, read_aliases
from labkit.service.multipart import Upload
from labkit.service.run import _listening
from labkit.service.schemas import JobCreate
from labkit.service.store import Store


def test_a_mark_happens_once(tmp_path: Path) -> None:
    store = Store(tmp_path).of("someone")
    assert store.add("event", objects.event("one"), "job", mark="step:1")
    assert not store.add("event", objects.event("one again"), "job", mark="step:1")
    assert store.add("event", objects.event("of another"), "other", mark="step:1")
    assert [row.body["message"] for row in store.rows("event", "job")] == ["one"]


def test_a_transaction_is_whole_or_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path).of("someone")
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.add("event", objects.event("one"), "job")
        raise ZeroDivisionError
    assert store.rows("event", "job") == []


def test_a_status_changes_only_from_where_it_may(tmp_path: Path) -> None:
    store = Store(tmp_path).of("someone")
    store.add("job", {"id": "j", "status": "cancelled", "n": 1})
    assert store.change("job", "j", {"status": "running"}, expect=("queued",)) is None
    assert store.status("job", "j") == "cancelled"
    changed = store.change("job", "j", {"n": 2}, {"step": 4})
    assert changed and (changed.body["n"], changed.inner["step"]) == (2, 4)


def test_what_a_crash_left_is_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    own = store.of("someone")
    for name in ("kept", "orphan"):
        (store.files / name).write_bytes(b"x")
    own.add("file", objects.file("kept", "x", "user_data", 1))
    own.add("job", {"id": "j", "status": "running", "finished_at": None}, inner={"model_id": "AAAA"})
    own.add("model", {"id": "ft:x"}, inner={"folder": "BBBB"})
    for folder in ("AAAA-ckpt-step-4", "BBBB", "CCCC"):
        (store.models / folder).mkdir()
    (store.incoming / "upload-1").write_bytes(b"half")
    store.sweep()
    assert [path.name for path in store.files.iterdir()] == ["kept"]
    assert sorted(path.name for path in store.models.iterdir()) == ["AAAA-ckpt-step-4", "BBBB"]
    assert not list(store.incoming.iterdir())


def test_a_database_of_another_format_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path).db.execute("PRAGMA user_version = 99")
    with pytest.raises(ServiceError, match="LABKIT_HOME"):
        Store(tmp_path)


def test_an_upload_that_is_too_large_leaves_nothing(tmp_path: Path) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    with pytest.raises(ApiError) as error, Upload("multipart/form-data; boundary=x", tmp_path, limit=1000) as upload:
        for _ in range(3):
            upload.write(head + b"y" * 400)
            head = b""
    assert error.value.status_code == 413 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, clean", [("My Lab", "my-lab"), ("", ""), ("a_b.c--d", "a-b-c--d"), ("x" * 64,) * 2])
def test_suffixes_are_cleaned(given: str, clean: str) -> None:
    assert JobCreate.model_validate({"model": "m", "training_file": "f", "suffix": given}).suffix == clean


def test_auto_hyperparameters_follow_the_published_rule() -> None:
    auto = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")
    assert worker.resolve(auto, 10) == {"n_epochs": 10, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert worker.resolve(auto, 5)["batch_size"] == 5 and worker.resolve(auto | {"n_epochs": 2}, 300)["n_epochs"] == 2
    assert worker.resolve(auto, 199)["batch_size"] == 8
    assert worker.resolve(auto, 200)["batch_size"] == 16


def test_the_shipped_aliases_cover_openais_names(tmp_path: Path) -> None:
    models, store = Models("base", read_aliases(tmp_path)), Store(tmp_path).of("someone")
    for name in ("gpt-3.5-turbo", "gpt-4o-mini-2024-07-18", "gpt-4.1-nano-2025-04-14", "babbage-002", "davinci-002",
                 "ada", "babbage", "curie", "davinci"):
        weights = models.weights(name, store)
        assert weights.alias and weights.folder is None
    assert not models.weights("base", store).alias
    with pytest.raises(ApiError):
        models.weights("gpt-neo", store)


def test_a_table_of_aliases_in_the_home_takes_the_place_of_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "model_aliases.json").write_text('{"patterns": ["my-*"]}')
    models = Models("base", read_aliases(tmp_path))
    assert models.is_alias("my-model") and not models.is_alias("gpt-4o")
    (tmp_path / "model_aliases.json").write_text('{"patterns": "gpt-4o"}')
    with pytest.raises(LabkitError, match="patterns"):
        read_aliases(tmp_path)


def ask(own: scheduler.Scheduler, answers: int = 1) -> Call:
    call = Call("me", Weights("x", None), ["x"], Sampling(1, 1, 1, None, (), 0, {}), copies=answers)
    own.submit(call)
    return call


def test_too_much_waiting_is_turned_away_for_a_while(tmp_path: Path) -> None:
    async def fill() -> None:
        own = scheduler.Scheduler(tmp_path, "x", tmp_path)  # its thread is not running: nothing gets done
        ask(own, scheduler.MAX_WAITING)
        with pytest.raises(ApiError) as error:
            ask(own)
        assert error.value.status_code == 429 and (error.value.headers or {})["Retry-After"]

    asyncio.run(fill())


def test_a_folder_without_a_model_is_told_and_not_retried(tmp_path: Path) -> None:
    async def fail() -> None:
        own = scheduler.Scheduler(tmp_path, "x", tmp_path)
        call = ask(own)
        own.start()
        for _ in range(2):  # and the thread goes on
            with pytest.raises(ApiError, match="config.json") as error:
                async for _ in call.pieces():
                    pass
            call = ask(own)
        assert error.value.code == "model_unavailable" and (error.value.headers or {})["x-should-retry"] == "false"
        own.close()
        assert not own.is_alive()

    asyncio.run(fail())


def test_a_model_that_is_deleted_while_its_call_waits_is_not_found(tmp_path: Path, tiny_model: Path) -> None:
    async def fail() -> None:
        own = scheduler.Scheduler(tiny_model, "x", tmp_path)
        own.start()
        call = Call("me", Weights("ft:x", tmp_path / "gone"), ["x"], Sampling(1, 1, 1, None, ()))
        own.submit(call)
        with pytest.raises(ApiError, match="ft:x") as error:
            async for _ in call.pieces():
                pass
        own.close()
        assert error.value.code == "model_not_found" and str(tmp_path) not in error.value.message

    asyncio.run(fail())


def test_offsets_count_characters_not_bytes() -> None:
    from labkit.engine.generate import Token

    pieces = [b"a", "é".encode()[:1], "é".encode()[1:], b"\xe2", b"b", "→!".encode(), b"z"]
    place = Offsets(special=frozenset({99}))
    offsets = [place.place(Token(i, piece, 0.0)) for i, piece in enumerate(pieces)]
    assert offsets == [0, 1, 1, 2, 3, 4, 6]  # the lone \xe2 becomes one replacement character
    assert place.place(Token(99, b"<|end|>", 0.0)) == 7 == place.characters


def test_replies_are_sent_without_nagles_delay() -> None:
    """Else a reply's second packet waits for the client's delayed acknowledgement: 40 ms a request."""
    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        with _listening("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(connected, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                answer = await found
                writer.close()
        return answer

    assert asyncio.run(accepted())
