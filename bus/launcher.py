"""Starts a worker program from a command line: one process, or the parent of several.

`python worker.py` needs nothing but the core; `bus worker` is the same behind the other commands.
"""

import logging
import os
import sys
from collections.abc import Sequence

import uvloop

from bus.bus import Bus
from bus.errors import DeclarationError
from bus.instrument.logging import attach, configure
from bus.streams.address import shared_url
from bus.worker.program import DRAINED, USAGE, Options, preflight, serve, supervise


def launch(options: Options, log_level: str, command: Sequence[str]) -> int:
    """Run a worker until it is told to stop; return the exit code of `worker/program.py`.

    log_level: "debug", "info" or "warning". command: what starts one of several processes.
    """
    configure(options.log, getattr(logging, log_level.upper()))
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - handlers are looked for where one stands
    try:
        return uvloop.run(_run(options, command))
    except DeclarationError as error:
        logging.getLogger("bus").error("%s", error)
        return USAGE
    except KeyboardInterrupt:
        return DRAINED


async def _run(options: Options, command: Sequence[str]) -> int:
    bus = Bus.connect(shared_url(options.url))
    attach(bus.telemetry)
    try:
        if options.processes == 1:
            return await serve(bus, options)
        code = await preflight(bus, options)  # once, here, instead of in every process
        return code or await supervise(command, options.processes, bus.telemetry)
    finally:
        await bus.close()
