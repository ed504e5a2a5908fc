"""The bench's command line: `python -m tests.bench` runs every row, `python -m tests.bench train classify` these."""

import argparse
import sys
from collections.abc import Callable

import openai
import torch

from labkit import paths
from labkit.engine import machine
from tests.bench import answering, growth, preparing, sheet, training, workload
from tests.bench.rivals import MissingRival
from tests.bench.sheet import Sheet

ROWS: dict[str, Callable[[openai.OpenAI, Sheet, str], None]] = {
    "train": training.train, "split": training.split, "trl": training.trl, "chat": training.chat,
    "classify": answering.classify, "shots": answering.shots, "generate": answering.generate,
    "overhead": answering.overhead, "start": answering.start, "busy": answering.busy, "clients": answering.clients,
    "examples": growth.examples, "lengths": growth.lengths, "jobs": growth.jobs, "serving": growth.clients,
    "prepare": preparing.prepare, "count": preparing.count,
}


def main() -> int:
    """Run the rows named on the command line, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Measure labkit beside rival stacks; report in build/bench/.",
        epilog="rows:\n" + "\n".join(f"  {name:10} {(row.__doc__ or '').splitlines()[0]}" for name, row in ROWS.items())
        + "\n\nexamples:\n  python -m tests.bench\n  python -m tests.bench train classify",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="what to measure (default: everything)")
    wanted = parser.parse_args().rows or list(ROWS)
    if unknown := [name for name in wanted if name not in ROWS]:
        parser.error(f"no row named {', '.join(unknown)}; there are {', '.join(ROWS)}")
    results = Sheet(paths.COURSE / "build" / "bench", machine=sheet.machine())
    failed = False
    with workload.home() as client:
        dtype = answering.measured_dtype()
        prompts = "int8" if machine.int8_pays() else dtype
        results.machine |= {"computes in": dtype, "prompts in": prompts, "threads": torch.get_num_threads(),
                            "data": workload.labkit.posts().attrs["source"]}
        for name in wanted:
            try:
                ROWS[name](client, results, dtype)
            except MissingRival as missing:
                results.skip(name, str(missing))
            except Exception as error:  # the other rows are worth having; the exit code tells
                failed = True
                results.skip(name, f"{type(error).__name__}: {error}")
            results.write()
    print(f"written: {results.folder / 'report.md'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
