"""Which groups are paused: the hash `bus:paused`, topic:group -> JSON.

Workers look once a second (`worker/pauses.py`). Whatever stands there pauses, also what is no JSON:
`HSET bus:paused order:receipts ''` by hand is enough. One that is over stays until its group is
paused again or resumed, and does nothing.
"""

from collections.abc import Sequence

import msgspec

from bus.streams import keys
from bus.streams.connection import Connection
from bus.streams.replies import Reply, ReplyError

Place = tuple[str, str]  # topic and group


class Pause(msgspec.Struct, frozen=True):
    """Why a group reads nothing of a topic now.

    since_ms, until_ms: by the server's clock; until None until somebody resumes it.
    why: what the one who paused it said.
    """

    since_ms: int = 0
    until_ms: int | None = None
    why: str = ""

    def holds(self, now_ms: int) -> bool:
        """Return whether it still does at that server time."""
        return self.until_ms is None or now_ms < self.until_ms


class PauseTable:
    """The pauses of all groups. Errors: as of `stream.py`."""

    def __init__(self, commands: Connection) -> None:
        self._commands = commands

    async def look(self) -> tuple[int, dict[Place, Pause]]:
        """Return the server's time in ms, and all pauses, those that are over among them.

        TIME and HGETALL, one write.
        """
        time, flat = await self._commands.pipeline([("TIME",), ("HGETALL", keys.PAUSED)])
        for reply, key in ((time, "TIME"), (flat, keys.PAUSED)):
            if isinstance(reply, ReplyError):
                raise reply.explained(key)
        return int(time[0]) * 1000 + int(time[1]) // 1000, pauses_of(flat)

    async def pause(self, place: Place, pause: Pause) -> None:
        """Pause a group on one topic, or change a pause. HSET."""
        value = msgspec.json.encode(pause)
        try:
            await self._commands.call("HSET", keys.PAUSED, _field(place), value)
        except ReplyError as error:
            raise error.explained(keys.PAUSED) from None

    async def resume(self, place: Place) -> bool:
        """End a pause; return whether there was one. HDEL."""
        try:
            return bool(await self._commands.call("HDEL", keys.PAUSED, _field(place)))
        except ReplyError as error:
            raise error.explained(keys.PAUSED) from None


def pauses_of(flat: Sequence[Reply]) -> dict[Place, Pause]:
    """Return the pauses that HGETALL answered."""
    found = {}
    for field, value in zip(flat[::2], flat[1::2], strict=True):
        topic, _, group = keys.text(field).partition(":")
        try:
            pause = msgspec.json.decode(value, type=Pause)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pause = Pause(why="what stands there says neither since when nor why")
        found[topic, group] = pause
    return found


def _field(place: Place) -> bytes:
    return keys.wire(":".join(place))
