"""`labkit prepare`: the arguments, and the questions asked on a terminal."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.errors import DataError

if TYPE_CHECKING:
    from labkit.examples.findings import Finding

EXAMPLES = """  labkit prepare posts.csv                    each fix is shown, then asked for
  labkit prepare posts.jsonl --yes --split stratified
  labkit prepare train.jsonl --valid valid.jsonl --dry-run
  labkit prepare train.jsonl --fix duplicates completion_space
  labkit prepare train.jsonl --yes --split grouped --by author
  labkit prepare old.jsonl --yes --to chat --model gpt-4.1-mini
  labkit prepare train.jsonl --json > findings.json

exit code: 0 fit for training, 1 not fit, 2 wrong usage"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `labkit prepare`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="JSONL, JSON, CSV, TSV, XLSX or TXT")
    parser.add_argument("--valid", type=Path, metavar="FILE", help="a validation file, checked against the first")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--yes", action="store_true", help="apply all fixes without asking")
    how.add_argument("--dry-run", action="store_true", help="show all fixes, and write nothing")
    how.add_argument("--fix", nargs="+", metavar="NAME", help="apply the fixes of these findings")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else; asks nothing")
    parser.add_argument("--split", choices=("random", "stratified", "grouped", "time"), help="hold out a part")
    parser.add_argument("--by", metavar="COLUMN", help="the column of a grouped split, or of a split by time")
    parser.add_argument("--share", type=_share, help="the part held out (default: a fifth, at most 1,000 examples)")
    parser.add_argument("--seed", type=int, default=42, help="of the split (default: 42)")
    parser.add_argument("--to", choices=("chat", "completion"), help="convert to this form")
    parser.add_argument("--model", help="whose tokens and limit count (default: the local base model)")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="the answers that are allowed")


def run(parsed: argparse.Namespace) -> int:
    """Prepare, and print the report. The exit code: 0 fit, 1 not fit, 2 wrong usage."""
    from labkit.examples.prepare import prepare  # here: `labkit --help` need not load numpy

    fix: Any = "all" if parsed.yes else parsed.fix
    if fix is None and not parsed.json and (parsed.dry_run or sys.stdin.isatty()):
        fix = Terminal(ask=not parsed.dry_run).ask
    try:
        result = prepare(parsed.file, parsed.valid, fix, parsed.split, parsed.by, parsed.share, parsed.seed,
                         parsed.to, parsed.model, parsed.labels, parsed.dry_run)
    except DataError as error:
        print(f"labkit prepare: {error}", file=sys.stderr)
        return 2
    if parsed.json:
        print(json.dumps(result.as_dict(), ensure_ascii=True))
    else:
        from rich.console import Console

        from labkit.examples.report import print_to

        print_to(Console(), result)
    return 0 if result.fit else 1


class Terminal:
    """Shows each fix before and after, and asks; or shows only."""

    def __init__(self, ask: bool) -> None:
        self.asking = ask

    def ask(self, finding: "Finding", samples: list[tuple[Any, Any]]) -> bool:
        """Whether to apply the fix. Anything but n means yes, as in the old tool."""
        print(f"\n{finding.code} ({finding.count:,}): {finding.message}\n  {finding.why}\n  Fix: {finding.fix}")
        for before, after in samples:
            print(f"  - {_short(before)}\n  + {'(set aside)' if after is None else _short(after)}")
        if not self.asking:
            return False
        try:
            return input("Apply? [Y/n] ").strip().lower() not in ("n", "no")
        except EOFError:
            return False


def _short(row: Any) -> str:
    text = json.dumps(row, ensure_ascii=False) if isinstance(row, dict) else f"{row}"
    return text if len(text) <= 200 else f"{text[:120]} … {text[-70:]}"


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share

