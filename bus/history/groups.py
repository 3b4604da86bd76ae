"""Which streams have a group, and what is said when none has."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from bus.errors import UnknownGroup
from bus.history.patience import patiently
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore


async def streams_with(
    store: StreamStore, streams: Sequence[str], group: str, topic: str | None = None
) -> dict[str, dict[str, Any]]:
    """Return the streams that have a group, and its rows of XINFO GROUPS.

    topic: the one that the streams are of; None if they are of several. XINFO GROUPS each.
    Errors: UnknownGroup when none has it; ServerError.
    """
    found: dict[str, dict[str, Any]] = {}
    others: set[str] = set()
    for stream in streams:
        try:
            groups = await patiently(partial(store.groups_of, stream))
        except ReplyError as error:
            raise error.explained(stream) from None
        if group in groups:
            found[stream] = groups[group]
        others.update(groups)
    if not found:
        raise no_such_group(group, topic, others)
    return found


def no_such_group(group: str, topic: str | None, others: Iterable[str]) -> UnknownGroup:
    """Return the error, which says what groups there are. topic: as of `streams_with`."""
    close = get_close_matches(group, [*others], 1)
    hint = f"did you mean {close[0]}? " if close else ""
    where = "no topic has a" if topic is None else f"topic {topic} has no"
    there = ", ".join(sorted(others)) or "none"
    return UnknownGroup(
        f"{where} group {group}: {hint}there are: {there}."
        " A worker that serves the handler makes it"
    )
