"""The Lua scripts: loaded once, sent by digest, by text when the server does not know them."""

import hashlib
import re
from functools import cache
from importlib import resources

from bus.config import REPLY_TIMEOUT_S
from bus.streams.connection import Arg, Connection, pack
from bus.streams.replies import Reply, ReplyError


class Script:
    """One verb in one file. `KEYS`, `ARGV` and the reply are described in its head."""

    __slots__ = ("_by_digest", "_text", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._text = _included(name).encode()
        self._by_digest = hashlib.sha1(self._text, usedforsecurity=False).hexdigest()

    def packed(self, keys: tuple[Arg, ...], args: list[Arg]) -> bytes:
        """Return EVALSHA with `keys` and `args` in wire form."""
        return pack(("EVALSHA", self._by_digest, len(keys), *keys, *args))

    def packed_with_text(self, keys: tuple[Arg, ...], args: list[Arg]) -> bytes:
        """Return EVAL with `keys` and `args` in wire form: after NOSCRIPT (restart, failover)."""
        return pack(("EVAL", self._text, len(keys), *keys, *args))

    async def run(
        self,
        connection: Connection,
        keys: tuple[Arg, ...],
        args: list[Arg],
        timeout_s: float = REPLY_TIMEOUT_S,
    ) -> Reply:
        """Run the script and return its reply. Errors: ReplyError, those of the connection."""
        (reply,) = await connection.submit(self.packed(keys, args), 1, timeout_s)
        if isinstance(reply, ReplyError) and reply.code == "NOSCRIPT":
            (reply,) = await connection.submit(self.packed_with_text(keys, args), 1, timeout_s)
        if isinstance(reply, ReplyError):
            raise reply
        return reply


# A line that stands for a file of functions that several scripts share. Making a function costs
# a run of the script about 0.5 us, so they stand where they are needed.
_INCLUDE = re.compile(r"^ *-- include (\w+)\n", re.MULTILINE)


@cache
def _included(name: str) -> str:
    """Return the text of a script, with what it includes, and what that includes."""
    file = resources.files("bus.streams") / "scripts" / f"{name}.lua"
    return _INCLUDE.sub(lambda line: _included(line[1]), file.read_text(encoding="utf-8"))
