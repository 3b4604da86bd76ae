"""What a replay is asked for, and what it tells of itself on the way."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from types import CodeType
from typing import Any

from bus.config import checked_number
from bus.errors import DeclarationError
from bus.history.position import Position
from bus.history.selection import Selection


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a replay is. Entries, of all its sessions.

    read: looked at. matched: asked for. replayed: those of them that are where they were to go.
    unreadable: no event of ours, or not to be decoded where it must be. gone: trimmed or deleted
    between the look and the replay.
    gaps: how often entries were trimmed before they were read: of the range some may be missing.
    share: of the range, by time, 0 to 1. at: the time that was reached, None before the first.
    waiting: whether there is no room where it goes.
    """

    read: int
    matched: int
    replayed: int
    unreadable: int
    gone: int
    gaps: int
    share: float
    at: datetime | None
    waiting: bool = False


OnProgress = Callable[[Progress], Awaitable[None] | None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a replay was asked for; see `Bus.replay`."""

    topic: str
    since: Position
    until: Position
    selection: Selection
    limit: int | None
    rate: float | None
    dry_run: bool
    checkpoint: str | os.PathLike[str] | None
    progress: OnProgress | None

    def __post_init__(self) -> None:
        if self.limit is not None:
            checked_number(self.limit, "limit", 1, 2**53, whole=True)
        if self.checkpoint is not None and not isinstance(self.checkpoint, str | os.PathLike):
            raise DeclarationError(f"checkpoint is the path of a file, not {self.checkpoint!r}")
        if self.progress is not None and not callable(self.progress):
            raise DeclarationError(f"progress is a function of a Progress, not {self.progress!r}")

    def said(self, server: str, destination: str) -> dict[str, Any]:
        """Return what must be the same when the replay is gone on with."""
        where = self.selection.where
        return {
            "server": server,
            "topic": self.topic,
            "to": destination,
            "since": None if self.since is None else str(self.since),
            "until": None if self.until is None else str(self.until),
            "types": self.selection.patterns,
            "key": self.selection.key,
            "where": None if where is None else _named(where),
            "limit": self.limit,
        }


def _named(where: Callable[..., Any]) -> str:
    """Return what tells one predicate from another: its name, and what it does."""
    name = getattr(where, "__qualname__", type(where).__qualname__)
    code = getattr(where, "__code__", None)
    return name if code is None else f"{name}#{_digest(code)}"


def _digest(code: CodeType) -> str:
    """Return a digest of what code does, be it the same on other lines of the file."""
    constants = [_digest(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    text = repr((code.co_code, code.co_names, code.co_varnames, constants))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
