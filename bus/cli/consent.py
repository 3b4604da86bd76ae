"""What changes something says what it will change, and asks first."""

import signal
import sys
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from bus.cli.codes import FAILED, USAGE
from bus.cli.options import CHANGES
from bus.cli.output import err, say


class Declined(Exception):
    """What was to be changed was not. code: the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Consent:
    """The options of commands that cannot be undone."""

    yes: Annotated[
        bool, Parameter(name=("--yes", "-y"), group=CHANGES, negative="", help="Do not ask.")
    ] = False
    dry_run: Annotated[
        bool, Parameter(group=CHANGES, negative="", help="Say what would be done, and do nothing.")
    ] = False

    def given(self, what: str, *, nothing: bool = False) -> bool:
        """Return whether to go on; asks where that was not said before.

        what: will be done, a sentence. nothing: there is nothing to do.
        Raises Declined, when the answer is no, or nobody can be asked.
        """
        if self.dry_run or nothing:
            if not nothing:
                say(f"would: {what}")
            return False
        if self.yes:
            return True
        say(what, style="bold")
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise Declined("this is no terminal, so nobody can be asked: say --yes", USAGE)
        answer = _asked("go on? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            raise Declined("nothing was changed", FAILED)
        return True


def _asked(question: str) -> str:
    """Ask on the terminal. The event loop stands still: Ctrl-C and SIGTERM act by themselves."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    ours = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        return err().input(question, markup=False)
    except EOFError:
        return ""
    finally:
        for number, handler in zip(numbers, ours, strict=True):
            signal.signal(number, handler)
