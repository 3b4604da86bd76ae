"""Lengths of time as people write them: 500ms, 30s, 5m, 2h, 1d, 1w."""

import re

_LENGTH = re.compile(r"(\d+(?:\.\d+)?)(ms|s|min|m|h|d|w)")
_UNIT_S = {
    "ms": 0.001,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3_600.0,
    "d": 86_400.0,
    "w": 604_800.0,
}


def length_s(text: str) -> float | None:
    """Return a length in seconds; None for what is none. What is too long for a float is inf."""
    found = _LENGTH.fullmatch(text.strip())
    return None if found is None else float(found[1]) * _UNIT_S[found[2]]
