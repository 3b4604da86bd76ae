"""`bus worker PACKAGE`: what `python worker.py` does for the package `handlers`, for anybody's."""

import os
from typing import Annotated, Literal

from cyclopts import Parameter

from bus.cli.options import COMMON, Json
from bus.config import GRACE_S
from bus.launcher import launch
from bus.streams.address import VARIABLES
from bus.worker.program import Options, child_command


def worker(
    package: str,
    /,
    *,
    only: Annotated[list[str] | None, Parameter(negative="")] = None,
    concurrency: int | None = None,
    processes: int = 1,
    grace_s: float = GRACE_S,
    log: Literal["json", "text"] | None = None,
    log_level: Literal["debug", "info", "warning"] = "info",
    url: Annotated[str | None, Parameter(group=COMMON, env_var=VARIABLES)] = None,
    json: Json = False,
) -> int:
    """Run the handlers of a package until SIGTERM or Ctrl-C: it drains; a second one stops at once.

    Exit codes: 0 drained, 1 failed, 2 usage or declaration, 69 server unreachable, 130 at once.

    Parameters
    ----------
    package
        Package or module with handlers; looked for where one stands, too.
    only
        Run this group alone; may be said again.
    concurrency
        Calls at a time, for every handler; by default its own.
    processes
        So many processes, started again when they end.
    grace_s
        Seconds that running handlers get at the end.
    log
        For people (text, the default) or for programs (json), on stderr.
    url
        redis://, rediss:// or unix://; by default redis://localhost:6379/0.
    json
        The same as --log json.
    """
    log = log or ("json" if json else "text")
    options = Options(url, package, tuple(only or ()), concurrency, processes, grace_s, log)
    arguments = [package, f"--grace-s={grace_s}", f"--log={log}", f"--log-level={log_level}"]
    arguments += [f"--only={group}" for group in only or ()]
    if concurrency is not None:
        arguments.append(f"--concurrency={concurrency}")
    if url is not None:
        os.environ["BUS_URL"] = url  # the children's, too: a command line is read by everybody
    return launch(options, log_level, child_command(["-m", "bus", "worker"], arguments))
