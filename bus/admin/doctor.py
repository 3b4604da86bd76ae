"""Looks at a server and a bus for whatever may be wrong; `diagnosis` judges. It only looks.

The questions are asked one after the other: a bus at work moves on by some milliseconds meanwhile.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from bus.admin.checks import Checked, CheckName, Limit, compared, limits_of, unknown
from bus.admin.diagnosis import Diagnosis, Seen, diagnosed, unusable
from bus.admin.finding import Finding
from bus.admin.server_findings import away, connection, locked
from bus.config import INSPECT_PATIENCE_S, checked_name
from bus.errors import (
    AuthenticationFailed,
    BusClosed,
    BusError,
    DeclarationError,
    PermissionDenied,
    UnknownTopic,
    WrongKeyType,
)
from bus.history.inspector import Inspector
from bus.history.letter import Letter, letter_of
from bus.history.patience import patiently
from bus.history.snapshot import GroupSnapshot, Snapshot, StreamSnapshot
from bus.streams import keys
from bus.streams.checkup import clock_seen, server_seen, types_of, youngest_letters
from bus.streams.replies import ReplyError
from bus.streams.rights import ROLES
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable, parsed

EXAMINED_ROLES = ("publisher", "worker", "admin")
LAG_COUNTED = 100  # entries before a group that are counted, to see whether the server is right
PLACES_MOST = 200  # streams of groups whose dead letters are looked into
TRIED = ("CLIENT|UNBLOCK", "WAIT", "WAITAOF")  # what the server may have or not


async def examine(store: StreamStore, inspector: Inspector, roles: Iterable[str]) -> Diagnosis:
    """Look for what is wrong. See `Admin.examine`."""
    roles = (roles,) if isinstance(roles, str) else tuple(roles)
    for role in roles:
        if role not in ROLES:
            raise DeclarationError(f"{role!r} is no role: there are {', '.join(ROLES)}")
    address = store.address
    words = [w for r in ("every connection", "doctor", *roles) for w in ROLES[r]]
    ask_rights = partial(store.rights.refused, (*words, *TRIED))
    try:
        server = await patiently(partial(server_seen, store), INSPECT_PATIENCE_S)
        useless = connection(address, server)
        if useless is not None:
            return unusable(address, useless)
        refused = await patiently(ask_rights, INSPECT_PATIENCE_S)
        clock = await patiently(partial(clock_seen, store), INSPECT_PATIENCE_S)
    except DeclarationError:
        raise
    except BusError as error:
        return unusable(address, _lost(address, error))
    look = _Look(store, inspector, Seen(address, server, roles, refused, clock))
    try:
        await look.at_all()
    except BusError as error:
        return diagnosed(look.seen, [_lost(address, error)])
    return diagnosed(look.seen)


async def check(
    store: StreamStore,
    table: TopicTable,
    inspector: Inspector,
    name: CheckName,
    topics: Iterable[str] | None,
    groups: Iterable[str] | None,
    warn: str | Limit | None,
    crit: str | Limit | None,
) -> Checked:
    """Compare one thing with limits. See `Admin.check`."""
    limits = limits_of(name, warn, crit)
    if isinstance(groups, str):
        raise DeclarationError("groups is a list of names, not a string")
    there = topics if topics is None or isinstance(topics, str) else list(topics)
    missing: list[str] = []
    try:
        try:
            snapshot = await inspector.snapshot(there)
        except UnknownTopic:
            there, missing = await _sorted_out(table, there or ())
            snapshot = await inspector.snapshot(there)
    except (DeclarationError, BusClosed):
        raise
    except BusError as error:
        why = str(error)
        if isinstance(error, ReplyError) and error.code == "NOAUTH":
            why = f"{store.address} asks for a password"
        return unknown(name, why, limits)
    return compared(name, snapshot, groups, limits, missing)


async def _sorted_out(table: TopicTable, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the topics that there are, and what is said of those that there are not."""
    there, missing = [], []
    for name in names:
        try:
            await patiently(partial(table.existing, name), INSPECT_PATIENCE_S)
            there.append(name)
        except UnknownTopic as error:
            missing.append(str(error))
    return there, missing


def _lost(address: str, error: BusError) -> Finding:
    if isinstance(error, BusClosed):
        raise error
    how = locked if isinstance(error, AuthenticationFailed) else away
    return how(address, str(error))


class _Look:
    """What was seen so far, step by step: an error leaves the steps before it as they were."""

    def __init__(self, store: StreamStore, inspector: Inspector, seen: Seen) -> None:
        self._store = store
        self._inspector = inspector
        self.seen = seen

    def _add(self, **seen: Any) -> None:
        self.seen = replace(self.seen, **seen)

    async def at_all(self) -> None:
        """Look at all topics. Errors: of the connection, and of a server that refuses all."""
        await self._at_types({keys.TOPICS: "hash", keys.PAUSED: "hash"})
        if self.seen.wrong_types:
            return  # nobody can say what there is
        try:
            await self._at_records()
            self._add(snapshot=await self._inspector.snapshot())
        except PermissionDenied as error:
            self._add(barred=str(error))
            return
        snapshot = self.seen.snapshot
        assert snapshot is not None
        await self._at_types(_expected(snapshot))
        await self._at_letters(snapshot)
        await self._at_lags(snapshot)

    async def _at_types(self, expected: dict[str, str]) -> None:
        found = await patiently(partial(types_of, self._store, expected), INSPECT_PATIENCE_S)
        wrong = {k: (kind, expected[k]) for k, kind in found.items() if kind != expected[k]}
        self._add(wrong_types={**self.seen.wrong_types, **wrong})

    async def _at_records(self) -> None:
        wrong = {}
        for name, record in (await patiently(self._store.topic_records)).items():
            try:
                parsed(checked_name(name, "topic name"), record)
            except DeclarationError as error:
                wrong[name] = str(error)
        self._add(wrong_records=wrong)

    async def _at_letters(self, snapshot: Snapshot) -> None:
        places = [(s.stream, g.group) for s, g in _groups(snapshot) if g.dead][:PLACES_MOST]
        look = partial(youngest_letters, self._store, places)
        found: dict[tuple[str, str], list[Letter]] = {}
        for (stream, group), entries in (await patiently(look, INSPECT_PATIENCE_S)).items():
            letters = found.setdefault((keys.topic_of(stream), group), [])
            letters += [letter_of(group, stream, entry) for entry in entries]
        self._add(letters=found)

    async def _at_lags(self, snapshot: Snapshot) -> None:
        """Count where the server may be wrong: it says more than was seen, or few enough."""
        suspects: dict[str, list[str]] = {}
        for stream, group in _groups(snapshot):
            if group.lag and (group.lag > group.undelivered or group.lag <= LAG_COUNTED):
                suspects.setdefault(stream.stream, []).append(group.group)
        wrong: dict[tuple[str, str], tuple[int, int]] = {}
        for key, groups in suspects.items():
            look = partial(self._store.archive.lags, key, groups, LAG_COUNTED)
            try:
                found = await patiently(look, INSPECT_PATIENCE_S)
            except PermissionDenied:
                return
            except (ReplyError, WrongKeyType):  # it is gone, or something else by now
                continue
            wrong |= {(key, g): pair for g, pair in found.items() if pair[0] > pair[1]}
        self._add(lags=wrong)


def _groups(snapshot: Snapshot) -> list[tuple[StreamSnapshot, GroupSnapshot]]:
    return [(s, g) for topic in snapshot.topics for s in topic.streams for g in s.groups]


def _expected(snapshot: Snapshot) -> dict[str, str]:
    """Return the keys of all streams and groups, and the type that each should have."""
    found: dict[str, str] = {}
    for topic in snapshot.topics:
        for stream in topic.streams:
            key = stream.stream
            found |= {key: "stream", keys.workers(key): "set", keys.overrun(key): "hash"}
            for group in stream.groups:
                found |= {
                    keys.inbox(key, group.group): "stream",
                    keys.dead(key, group.group): "stream",
                }
    return found
