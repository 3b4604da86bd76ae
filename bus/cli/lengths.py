"""Lengths of time on the command line; a bare number is seconds."""

from bus.errors import DeclarationError
from bus.history.lengths import length_s

_MOST_S = 1e10  # three hundred years


def seconds(text: str, option: str) -> float:
    """Return a length in seconds. Errors: DeclarationError, which names the option."""
    found = length_s(text)
    if found is None:
        found = length_s(f"{text.strip()}s")
    if found is None or found > _MOST_S:
        raise DeclarationError(f"{option} is a length of time such as 30s, 5m or 2h, not {text!r}")
    return found
