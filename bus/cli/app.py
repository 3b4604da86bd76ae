"""The tree of commands, and what becomes of errors.

Exit codes: 0 done; 1 failed, declined, or something is wrong that was asked about; 2 wrong usage or
declaration; 69 the server cannot be reached, or the extra is not installed; 130 interrupted.
`bus check` has those of monitors instead: 0 ok, 1 warning, 2 critical, 3 unknown.
"""

import asyncio
import inspect
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from cyclopts import App, CycloptsError

from bus.cli.codes import DONE, FAILED, INTERRUPTED, UNKNOWN, USAGE

# Each is imported when it is called: `bus --help` need not wait for any of them.
COMMANDS = (
    ("worker", "worker:worker", "Run the handlers of a package until told to stop."),
    ("publish", "publish:publish", "Publish an event, or a line of input each."),
    ("tail", "tail:tail", "Follow topics: what comes, or from any point on."),
    ("history", "history:history", "Look back at a topic: by time, type, key or expression."),
    ("replay", "replay:replay", "Give a group events of the past again, and nobody else."),
    ("topics", "topics:app", "Topics: list, look at, change, trim."),
    ("groups", "groups:app", "Groups: list, lag, create, move, pause, remove."),
    ("consumers", "consumers:app", "Consumers: list, remove those that are gone."),
    ("pending", "pending:app", "What groups were given and have not finished."),
    ("dead", "dead:app", "Dead letters: list, show, redrive, purge, export."),
    ("schema", "schema:app", "Schemas of events: list, export, check a change."),
    ("doctor", "doctor:doctor", "Look for what is wrong, and say what mends it."),
    ("check", "check:app", "Compare with limits, for monitors."),
    ("completion", "completion:completion", "Print what makes a shell complete commands."),
)


def tree(called: str = "") -> App:
    """Return the commands; the one that is `called` says of itself what it has to say."""
    app = App(
        name="bus",
        help="A typed event bus on Redis Streams: run it, look at it, mend it.",
        version=lambda: version("bus-streams"),
        help_format="plaintext",
    )
    for name, module, text in COMMANDS:
        app.command(f"bus.cli.{module}", name=name, help=None if name == called else text)
    return app


# What these write is all they do: who stops reading has what he wanted.
_LOOKING = {
    *("check", "completion", "doctor", "history", "schema", "tail"),
    *("export", "info", "lag", "ls", "show", "--help", "--version"),
}
_COMMON = ("--url", "--app")
_PASSWORD = re.compile(r"//[^/@\s]*@")


def run(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    arguments = _common_last(list(arguments))
    try:
        return _called(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `bus history order | head`
        if _LOOKING.intersection(arguments[:2]):
            return DONE
        sys.stderr.write("error: nobody reads what is written: look at what was done before\n")
        return FAILED
    finally:
        logging.shutdown()
        _let_go()


def _let_go() -> None:
    """Drop what nobody took of stdout, which Python would try to write once more at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _common_last(arguments: list[str]) -> list[str]:
    """Let the options of all commands stand before the command, too."""
    first: list[str] = []
    while arguments and arguments[0].partition("=")[0] in (*_COMMON, "--json"):
        many = 2 if arguments[0] in _COMMON else 1
        first += arguments[:many]
        arguments = arguments[many:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return [*arguments[:at], *first, *arguments[at:]]


def _called(arguments: list[str]) -> int:
    called = next((a for a in arguments if not a.startswith("-")), "")
    try:
        command, bound, _ = tree(called).parse_args(
            arguments, print_error=False, exit_on_error=False
        )
    except CycloptsError as error:
        sys.stderr.write(f"error: {_PASSWORD.sub('//***@', _said(error))}\n")
        return _code(called, USAGE)
    try:
        result: Any = command(*bound.args, **bound.kwargs)
        if inspect.iscoroutine(result):
            import uvloop  # noqa: PLC0415 - not for --help

            result = uvloop.run(_interruptible(result))
        sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except Exception as error:
        from bus.cli.failure import told  # noqa: PLC0415 - only when something is wrong

        return _code(called, told(error))
    return result if isinstance(result, int) else DONE


def _said(error: CycloptsError) -> str:
    """Return what is wrong in one line, without what a terminal would obey."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _code(called: str, code: int) -> int:
    """Return an exit code; to a monitor wrong usage is unknown, and not critical."""
    return UNKNOWN if called == "check" and code == USAGE else code


async def _interruptible(command: Any) -> Any:
    """Run a command that SIGTERM ends as Ctrl-C does: what was begun is put in order."""
    task = asyncio.ensure_future(command)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
