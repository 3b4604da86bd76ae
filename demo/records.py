"""The keys under which workers put on record what they do: the truth that the report is held to.

    demo:started:<group>     hash: event id -> runs that began
    demo:failed:<group>      hash: event id -> runs that raised
    demo:finished:<group>    hash: event id -> runs that returned
    demo:handled:<group>     hash: event id -> when the last run returned, in ms since 1970

A run is recorded as handled after the handler returned and before the bus acknowledges it.
"""

import time


def started(group: str) -> str:
    """Return the key that counts the runs that began."""
    return f"demo:started:{group}"


def failed(group: str) -> str:
    """Return the key that counts the runs that raised."""
    return f"demo:failed:{group}"


def finished(group: str) -> str:
    """Return the key that counts the runs that returned."""
    return f"demo:finished:{group}"


def handled(group: str) -> str:
    """Return the key that tells when each event was handled."""
    return f"demo:handled:{group}"


def now_ms() -> float:
    """Return the time in ms since 1970: one clock for all processes of one machine."""
    return time.time() * 1000
