"""Runs the handlers of a package until it is told to stop: `python worker.py --help`."""

import argparse
import sys
from collections.abc import Sequence

from bus import DeclarationError
from bus.launcher import launch
from bus.stdio import prepare
from bus.worker.program import USAGE, Options, child_command


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; argparse exits with 2 when it is wrong."""
    p = argparse.ArgumentParser(prog="worker.py", description=__doc__)
    p.add_argument("--url", help="redis://, rediss:// or unix:// (default: BUS_URL, REDIS_URL)")
    p.add_argument("--handlers", default="handlers", metavar="PACKAGE", help="default: handlers")
    p.add_argument("--only", action="append", default=[], metavar="GROUP", help="repeatable")
    p.add_argument("--concurrency", type=int, metavar="N", help="per handler (default: its own)")
    p.add_argument("--processes", type=int, default=1, metavar="N", help="default: 1")
    p.add_argument("--grace-s", type=float, default=20.0, metavar="S", help="default: 20")
    p.add_argument("--log", choices=("json", "text"), default="text", help="default: text")
    p.add_argument("--log-level", choices=("debug", "info", "warning"), default="info")
    p.add_argument(
        "--demo", nargs="?", const="", metavar="FOLDER", help="run the main job on FOLDER and exit"
    )
    return p.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    prepare()
    a = parsed(arguments)
    if a.demo is not None:
        from demo.run import main as demo  # noqa: PLC0415 - only the demo needs it

        return demo(a.demo or None, a.url)
    try:
        options = Options(
            a.url, a.handlers, tuple(a.only), a.concurrency, a.processes, a.grace_s, a.log
        )
    except DeclarationError as error:
        print(error, file=sys.stderr)  # noqa: T201 - there is no log yet
        return USAGE
    return launch(options, a.log_level, child_command([__file__], arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
