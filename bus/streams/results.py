"""What scripts answer becomes values: the other direction of `stream.py`."""

from collections.abc import Sequence
from typing import Any

from bus.streams import keys
from bus.streams.answers import Appended, Committed, Fate, Pinned, Room, Taken
from bus.streams.replies import Reply, ReplyError


def pinned(reply: Reply) -> Pinned | None:
    """Return who pins a stream, None if nobody does."""
    if not reply:
        return None
    group, floor, pending, lag = reply
    return Pinned(keys.text(group), floor.decode(), pending, lag if lag >= 0 else None)


def by_group(flat: Sequence[bytes]) -> dict[str, list[str]]:
    """Return {group: ids} of a flat list of pairs."""
    found: dict[str, list[str]] = {}
    for group, entry_id in zip(flat[::2], flat[1::2], strict=True):
        found.setdefault(keys.text(group), []).append(entry_id.decode())
    return found


def counts(flat: Sequence[Any]) -> dict[str, int]:
    """Return {group: number} of a flat list of pairs."""
    return {keys.text(g): n for g, n in zip(flat[::2], flat[1::2], strict=True)}


_REPEATED = 1  # of the fourth that `append.lua` answers; 2 is out of turn


def appended(replies: list[Reply]) -> Appended:
    """Return what `StreamStore.append_soon` was answered. Errors: ReplyError."""
    (reply,) = replies
    if isinstance(reply, ReplyError):
        raise reply
    first, added, taken, how, left, *looked = reply
    ms, _, low = first.decode().partition("-")
    if not looked:
        room = Room(left, None, {})
        return Appended(
            ms, int(low or 0), added, taken, how == _REPEATED, room, {}, how > _REPEATED
        )
    who, lost, dropped = looked
    room = Room(left, pinned(who), by_group(lost))
    return Appended(ms, int(low or 0), added, taken, how == _REPEATED, room, counts(dropped))


DONE, _REFUSED = Committed(Fate.DONE), Committed(Fate.REFUSED)


def fate_of(answer: Reply) -> Committed:
    """Return what became of the effects of one delivery or transaction."""
    if answer == 1:
        return DONE
    if answer == 0:
        return _REFUSED
    if answer[0] == Fate.UNDONE:
        return Committed(Fate.UNDONE, error=answer[1].decode(errors="replace"))
    fate, first, second = answer
    if fate == Fate.FULL:
        return Committed(Fate.FULL, stream=first.decode(), pinned=pinned(second))
    if fate == Fate.FAILED:
        applied = tuple(second.decode(errors="replace").split("\n")) if second else ()
        return Committed(Fate.FAILED, error=first.decode(errors="replace"), applied=applied)
    replies = tuple(
        (ran > 0, int(reply) if ran > 1 else reply)
        for ran, reply in zip(first, second, strict=True)
    )
    return Committed(Fate.DONE, replies=replies)


def taken_of(reply: Reply) -> Taken:
    """Return entries that a script moved, and ids it met without one."""
    entries, lost = reply
    return Taken([(i, c, f) for i, c, f in entries], lost)
