"""Whether a plain value that is written fits what is read: numbers, texts, what they stand for."""

import re
from math import floor, inf

from bus.schema.node import Alternative, Node

# Kinds that travel as text; in msgpack not all of them.
TEXTS = frozenset(
    ("string", "texts", "datetime", "time", "date", "duration", "uuid", "decimal", "bytes")
)


def or_endless(most: int | None) -> float:
    """Return an upper bound that can be compared; there may be none."""
    return inf if most is None else most


def fits(reader: Alternative, written: Alternative) -> bool:  # noqa: PLR0911 - one a kind
    """Return whether a plain value is read; reader and written are known to share a tier."""
    mine, theirs = reader.node, written.node
    same = reader.kind == written.kind
    match reader.kind:
        case "integer" | "number":
            return _number_fits(mine, written)
        case "string":
            return _text_fits(mine, written)
        case "datetime" | "time":
            return same and mine.tz in (None, theirs.tz)
        case "bytes":
            return same and within(
                (mine.min_bytes, mine.max_bytes), (theirs.min_bytes, theirs.max_bytes)
            )
        case "decimal":
            return same or written.kind not in TEXTS
        case "other":
            return mine.const == theirs.const
    return same


def within(mine: tuple[int | None, int | None], theirs: tuple[int | None, int | None]) -> bool:
    """Return whether one span of lengths lies in another."""
    return (mine[0] or 0) <= (theirs[0] or 0) and or_endless(theirs[1]) <= or_endless(mine[1])


def takes_any_text(node: Node) -> bool:
    """Return whether a text is not limited."""
    return within((node.min_length, node.max_length), (0, None)) and node.pattern is None


def _text_fits(reader: Node, written: Alternative) -> bool:
    writer = written.node
    mine = reader.min_length, reader.max_length
    if written.kind == "texts":
        texts = [v for v in written.values if isinstance(v, str)]
        return all(within(mine, (len(v), len(v))) and _matches(reader, v) for v in texts)
    if written.kind == "string":
        same_pattern = reader.pattern in (None, writer.pattern)
        return same_pattern and within(mine, (writer.min_length, writer.max_length))
    return takes_any_text(reader)


def _matches(node: Node, text: str) -> bool:
    try:
        return node.pattern is None or re.search(node.pattern, text) is not None
    except re.error:  # somebody has edited the exported file
        return False


def _number_fits(reader: Node, written: Alternative) -> bool:
    if written.kind == "numbers":
        values = [v for v in written.values if isinstance(v, int)]
        return all(_number_fits(reader, _just(v)) for v in values)
    writer = Node() if written.kind == "flags" else written.node
    whole = written.kind != "number"
    divisor = writer.multiple_of or (1 if whole else None)
    if reader.multiple_of is not None and (divisor is None or divisor % reader.multiple_of):
        return False
    return _low(reader) <= _low(writer, whole=whole) and _high(writer, whole=whole) <= _high(reader)


def _just(value: int) -> Alternative:
    return Alternative("integer", Node(minimum=value, maximum=value, multiple_of=value or None))


def _low(node: Node, *, whole: bool = False) -> tuple[float, bool]:
    """Return the lower end of a range, and whether it is outside of it; endless without one."""
    if node.exclusive_minimum is not None:
        if whole:
            return floor(node.exclusive_minimum) + 1, False
        return node.exclusive_minimum, True
    return (-inf, False) if node.minimum is None else (node.minimum, False)


def _high(node: Node, *, whole: bool = False) -> tuple[float, bool]:
    """Return the upper end of a range, and whether it is within it."""
    if node.exclusive_maximum is not None:
        if whole:
            return -floor(-node.exclusive_maximum) - 1, True
        return node.exclusive_maximum, False
    return (inf, True) if node.maximum is None else (node.maximum, True)
