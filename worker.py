"""Runs the handlers of a package until it is told to stop: `python worker.py --help`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import uvloop

from bus import Bus, DeclarationError
from bus.instrument.logging import attach, configure
from bus.worker.program import (
    DRAINED,
    USAGE,
    Options,
    child_command,
    preflight,
    serve,
    supervise,
)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; argparse exits with 2 when it is wrong."""
    p = argparse.ArgumentParser(prog="worker.py", description=__doc__)
    p.add_argument(
        "--url", help="redis://, rediss:// or unix:// (default: BUS_URL, then localhost)"
    )
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


async def run(options: Options, arguments: Sequence[str]) -> int:
    """Run one worker, or the parent of several; return the exit code."""
    bus = Bus.connect(options.url)
    attach(bus.telemetry)
    try:
        if options.processes > 1:
            code = await preflight(bus, options)  # once, here, instead of in every process
            if code != DRAINED:
                return code
            command = child_command(__file__, arguments)
            return await supervise(command, options.processes, bus.telemetry)
        return await serve(bus, options)
    finally:
        await bus.close()


def main(arguments: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    a = parsed(arguments)
    if a.demo is not None:
        from demo.run import main as demo  # noqa: PLC0415 - only the demo needs it

        return demo(a.demo or None, a.url)
    configure(a.log, getattr(logging, a.log_level.upper()))
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - handlers are looked for where one stands
    try:
        options = Options(
            a.url, a.handlers, tuple(a.only), a.concurrency, a.processes, a.grace_s, a.log
        )
        code = uvloop.run(run(options, arguments))
    except DeclarationError as error:
        logging.getLogger("bus").error("%s", error)
        return USAGE
    except KeyboardInterrupt:
        return DRAINED
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
