"""The checks of notebook 03, prepare data."""

import random
from typing import Any

from labkit.lessons.exercises import Wrong, call, exercise, same


@exercise("03.1", "From pair to chat", level=1, hints=(
    'Two messages in a list, {"role": …, "content": …} each, under the key "messages".',
    "The separator stands at the end of the prompt only: prompt.removesuffix(separator).",
    'completion.removeprefix(" ") takes away one space at the beginning, if there is one.',
))
def to_chat(answer: Any) -> None:
    """A function of prompt, completion and separator: the chat example."""
    for separator in ("\n\n###\n\n", " ->", "\n\n===\n\n"):
        for text, completion in (("Two  outs,\nbases loaded", " baseball"), (f"A list{separator}inside", "hockey"),
                                 ("Who won?", "  two spaces"), (f"Game {random.randint(1, 7)}", " hockey")):
            right = {"messages": [{"role": "user", "content": text},
                                  {"role": "assistant", "content": completion.removeprefix(" ")}]}
            same(call(answer, text + separator, completion, separator), right,
                 f"the prompt {text + separator!r}, the completion {completion!r} and the separator {separator!r}")


@exercise("03.2", "One spelling each", level=1, hints=(
    'typed.strip(" .") takes spaces and full stops away from both ends.',
    "Compare in lower case, both what was typed and what is on the list; return it as it is on the list.",
    'Go through the labels; if none agrees, return "unknown".',
))
def one_spelling(answer: Any) -> None:
    """A function of a typed label and the list: the label of the list, or "unknown"."""
    labels = random.sample(["Ice hockey", "Baseball", "golf", "N.B.A"], 4)
    for label in labels:
        for typed in (label, label.upper(), f"  {label.lower()} ", f"{label}. ", f" .{label.title()}"):
            same(call(answer, typed, list(labels)), label, f"{typed!r} and the labels {labels}")
    for typed in ("cricket", "", "base ball", "hockey"):
        same(call(answer, typed, list(labels)), "unknown", f"{typed!r} and the labels {labels}")


@exercise("03.3", "Targets", level=2, hints=(
    "Targets are as many as there are tokens: prompt, completion, and the one that ends the text.",
    "Prompt positions get -100, as many as the prompt has tokens.",
    "[-100] * len(prompt_ids) + completion_ids + [end].",
))
def targets(answer: Any) -> None:
    """A function of prompt ids, completion ids and the end's id: the targets."""
    for _ in range(5):
        prompt, completion = ([random.randint(3, 49_000) for _ in range(random.randint(1, most))] for most in (6, 3))
        same(call(answer, list(prompt), list(completion), 2), [-100] * len(prompt) + completion + [2],
             f"the prompt {prompt}, the completion {completion} and the end 2")


@exercise("03.4", "Padding", level=2, hints=(
    "Take the lengths batch by batch, in their order: lengths[0:batch_size], and so on.",
    "A batch is max(batch) * len(batch) positions, of which sum(batch) are real.",
    "Add up the differences. The last batch has its own length: len(batch), not batch_size.",
))
def padding(answer: Any) -> None:
    """A function of lengths and batch size: padding tokens in all."""
    for count, size in ((8, 4), (9, 4), (3, 4), (random.randint(10, 30), random.randint(3, 7))):
        lengths = [random.randint(5, 128) for _ in range(count)]
        batches = [lengths[i:i + size] for i in range(0, count, size)]
        same(call(answer, list(lengths), size), sum(max(batch) * len(batch) - sum(batch) for batch in batches),
             f"the lengths {lengths} in batches of {size}")


@exercise("03.5", "Split by group", level=3, hints=(
    "Choose authors, not posts; the held-out posts are all posts of the chosen ones.",
    "Count each author's posts and add authors until share * len(authors) is reached. "
    "Beginning with the rare ones, the busiest stays for training.",
    "In the end try to give back each chosen author whose posts are not needed to reach the share.",
))
def hold_out(answer: Any) -> None:
    """A function of authors and share: held-out positions; any choice will do that keeps the rules."""
    for share in (0.1, 0.2, 0.3, 0.2, 0.1):
        sizes = [random.randint(12, 20), *(random.randint(1, 6) for _ in range(9))]
        authors = [name for name, size in zip("ABCDEFGHIJ", sizes, strict=True) for _ in range(size)]
        random.shuffle(authors)
        found = call(answer, list(authors), share)
        case = f"{len(authors)} posts by {dict(zip('ABCDEFGHIJ', sizes, strict=True))} and a share of {share}"
        if not isinstance(found, list) or not all(type(i) is int and 0 <= i < len(authors) for i in found):
            raise Wrong(f"For {case} a list of numbers from 0 to {len(authors) - 1} is wanted, not {found!r:.60}.")
        held = {authors[i] for i in found}
        complete = sum(name in held for name in authors)
        if len(set(found)) != len(found) or len(found) < complete:
            raise Wrong(f"For {case} an author stands on both sides, or a post is named twice: {sorted(found)}.")
        if complete == len(authors) or complete < share * len(authors):
            raise Wrong(f"For {case} you hold out {complete} posts, {sorted(held)}.")
        spare = [name for name in sorted(held) if complete - authors.count(name) >= share * len(authors)]
        if spare:
            raise Wrong(f"For {case} you hold out {sorted(held)}, {complete} posts; without {spare[0]} "
                        f"there would still be {complete - authors.count(spare[0])}.")
