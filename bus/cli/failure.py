"""What goes wrong, as a sentence and an exit code."""

from bus.cli.codes import FAILED, UNREACHABLE, USAGE
from bus.cli.consent import Declined
from bus.cli.output import say
from bus.errors import BusError, DeclarationError, ServerUnreachable


def told(error: Exception) -> int:
    """Say what went wrong, with what was done before it; return the exit code.

    What is no error of the library or the system is a bug, and is raised.
    """
    if isinstance(error, Declined):
        say(str(error))
        return error.code
    if not isinstance(error, BusError | OSError):
        raise error
    said = str(error) or type(error).__name__
    for line in (said, *getattr(error, "__notes__", ())):
        say(f"error: {line}" if line is said else line, "red")
    if isinstance(error, DeclarationError):
        return USAGE
    return UNREACHABLE if isinstance(error, ServerUnreachable) else FAILED
