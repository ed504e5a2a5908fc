"""The `labkit` command: serve, stop, keys, lab, progress, prepare, cost, doctor, kit."""

import argparse
import os
import re
import sys
from pathlib import Path

from labkit import __version__
from labkit.errors import LabkitError

PORT = 8712


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed with a message, 2 wrong usage, 130 interrupted."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except LabkitError as error:
        print(f"labkit {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="labkit",
        description="Fine-tuning through the OpenAI SDK, on your own machine.",
        epilog="examples:\n  labkit lab             the whole lab, headless\n"
               "  labkit serve           the local service, for notebooks and scripts of your own\n"
               "  labkit stop            end a service that a notebook started\n"
               "  labkit keys add alice  a key for another person\n"
               "  labkit prepare FILE    check, mend and split a training file\n"
               "  labkit cost FILE       what training and using a model costs\n"
               "  labkit doctor          what is ready on this machine\n"
               "  labkit kit /media/usb  all that is needed to teach without network",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"labkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _serve_parser(commands)
    _command(commands, "stop", _stop, "end the running local service", "  labkit stop")

    _keys_parser(commands)

    lab = _command(commands, "lab", _lab, "run the lab notebook headless and print its results",
                   "  labkit lab\n  labkit lab --out my-results")
    lab.add_argument("--out", type=Path, default=Path("build/lab"), metavar="FOLDER",
                     help="where notebook, HTML, figures and results.json go (default: build/lab)")

    _command(commands, "progress", _progress, "show which exercises are done", "  labkit progress")

    from labkit.examples import command as prepare

    prepare.add_arguments(_command(commands, "prepare", prepare.run, "check, mend and split a training file",
                                   prepare.EXAMPLES))

    _cost_parser(commands)
    _command(commands, "doctor", _doctor, "tell what is ready on this machine, what is not, and how to mend it",
             "  labkit doctor\n  labkit doctor > report.txt     exit code 1 if something has to be fixed")

    kit = _command(commands, "kit", _kit, "gather all that is needed to teach without network in one folder",
                   "  labkit kit /media/usb/course      course, model, data, packages for this platform\n"
                   "  labkit kit kit --torch-index https://download.pytorch.org/whl/cpu    the small torch, on Linux\n"
                   "An interrupted run goes on where it was; run it again after a change to renew the kit.")
    kit.add_argument("folder", type=Path, metavar="DIR", help="the folder, made if it is not there")
    kit.add_argument("--torch-index", metavar="URL", help="package index to take torch from (default: pip's own)")
    return parser


def _serve_parser(commands) -> None:  # type: ignore[no-untyped-def]
    serve = _command(commands, "serve", _serve, "run the local service",
                     "  labkit serve\n  labkit serve --port 0          any free port\n"
                     "  labkit serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem   for a whole room\n"
                     "  labkit serve --base-model ./gpt2   another model, in Hugging Face's format")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=int, default=PORT, help=f"port (default: {PORT}; 0: any free one)")
    serve.add_argument("--base-model", type=Path, metavar="FOLDER",
                       help="a causal LM that transformers can load (default: SmolLM2-135M-Instruct)")
    serve.add_argument("--idle-exit", type=float, metavar="MINUTES", help="end after so long without work")
    serve.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate (PEM), to be reached over https")
    serve.add_argument("--tls-key", type=Path, metavar="FILE", help="the certificate's private key (PEM)")
    serve.add_argument("--insecure", action="store_true",
                       help="let other machines in without TLS; anyone on the network can read along")
    serve.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                       help="another name that clients call this machine by; may be repeated")
    serve.add_argument("--allow-origin", action="append", default=[], metavar="URL",
                       help="web pages that may call the service from a browser; may be repeated")


def _cost_parser(commands) -> None:  # type: ignore[no-untyped-def]
    cost = _command(commands, "cost", _cost, "tell what training on a file costs, and using the model, before paying",
                    "  labkit cost train.jsonl\n  labkit cost train.jsonl --model gpt-4o-mini --requests 100000\n"
                    "  labkit cost train.jsonl --model ada --model curie --date 2023-03-01   as it was then\n"
                    "  labkit cost train.jsonl --json > cost.json")
    cost.add_argument("file", type=Path, metavar="FILE", help="a training file (JSONL)")
    cost.add_argument("--model", action="append", help="a model; may be repeated (default: all that can be trained)")
    cost.add_argument("--date", metavar="YYYY-MM-DD", help="the day whose prices count (default: today)")
    cost.add_argument("--epochs", type=int, help="epochs of training (default: OpenAI's auto rule)")
    cost.add_argument("--requests", type=int, default=10_000, help="requests afterwards (default: 10000)")
    cost.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _keys_parser(commands) -> None:  # type: ignore[no-untyped-def]
    keys = _command(commands, "keys", _keys, "add, list and revoke keys, one for each person",
                    "  labkit keys add alice\n  labkit keys add bob --jobs 2 --bytes 500MB --requests-per-minute 600\n"
                    "  labkit keys list\n  labkit keys revoke bob")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make a key and print it, this once")
    add.add_argument("name", metavar="NAME", help="whose key it is; files, jobs and models belong to this name")
    add.add_argument("--jobs", type=_count, metavar="N", help="unfinished jobs at a time (default: any number)")
    add.add_argument("--bytes", type=_size, metavar="SIZE", help="of all files and models, as 500MB (default: any)")
    add.add_argument("--requests-per-minute", type=_count, metavar="N", help="(default: any number)")
    actions.add_parser("list", help="show the keys' names, what they use and what they may use")
    revoke = actions.add_parser("revoke", help="make a key worthless at once, pause its jobs, end its batches")
    revoke.add_argument("name", metavar="NAME")


def _command(commands, name, run, help, examples):  # type: ignore[no-untyped-def]
    command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".",
                                  epilog=f"examples:\n{examples}",
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.set_defaults(run=run)
    return command


def _serve(parsed: argparse.Namespace) -> int:
    from labkit import assets, paths
    from labkit.service.run import BASE_NAME, serve

    if (parsed.tls_cert is None) != (parsed.tls_key is None):
        raise LabkitError("--tls-cert and --tls-key belong together. Give both, or neither.")
    tls = (parsed.tls_cert, parsed.tls_key) if parsed.tls_cert else None
    base = parsed.base_model or assets.base_model()
    own = parsed.base_model is None and "LABKIT_BASE_MODEL" not in os.environ
    serve(parsed.host, parsed.port, paths.home(), base, BASE_NAME if own else base.resolve().name.lower(),
          idle_exit=None if parsed.idle_exit is None else parsed.idle_exit * 60, tls=tls,
          insecure=parsed.insecure, names=parsed.allow_host, origins=parsed.allow_origin)


def _stop(parsed: argparse.Namespace) -> int:
    from labkit.client.connect import stop_service

    print("Stopped." if stop_service() else "No local service is running.")
    return 0


def _keys(parsed: argparse.Namespace) -> int:
    """Works on the home folder's database, whether or not the service is running."""
    from labkit import paths
    from labkit.service import keys
    from labkit.service.store import Store

    store = Store(paths.home())
    if parsed.action == "add":
        key = keys.add(store, parsed.name, parsed.jobs, parsed.bytes, parsed.requests_per_minute)
        print(f"The key of {parsed.name}. It is shown this once and cannot be looked up:\n{key}")
    elif parsed.action == "revoke":
        paused = keys.revoke(store, parsed.name)
        print(f"The key of {parsed.name} is revoked, and {paused} of its jobs paused; batches end. "
              f"What it owns stays, and labkit keys add {parsed.name} makes a new key for it.")
    else:
        print(keys.table(store))
    return 0


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _size(text: str) -> int:
    """Bytes; KB, MB and GB are powers of 1,024."""
    found = re.fullmatch(r"(\d+)\s*([KMG]?)B?", text.upper())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB, 2GB or a number of bytes")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def _lab(parsed: argparse.Namespace) -> int:
    from labkit.lab import run

    return run(parsed.out)


def _progress(parsed: argparse.Namespace) -> int:
    from labkit.lessons.exercises import progress

    print(progress())
    return 0


def _cost(parsed: argparse.Namespace) -> int:
    from labkit import cost

    return cost.report(parsed.file, parsed.model, parsed.date, parsed.epochs, parsed.requests, parsed.json)


def _doctor(parsed: argparse.Namespace) -> int:
    from labkit.checkup import examine

    needed = 0
    for line in examine():
        print(line, flush=True)
        needed += line.state == "FIX"
    return 1 if needed else 0


def _kit(parsed: argparse.Namespace) -> int:
    from labkit import kit

    return kit.gather(parsed.folder, parsed.torch_index)
