"""`StreamStore` and what belongs to it, on a place of this process.

Whatever is a script on a server is a verb of this package. What is but plain commands is inherited:
`Direct` answers them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from bus.config import BATCH_BYTES
from bus.streams import keys
from bus.streams.answers import (
    Appended,
    Buried,
    Claim,
    Committed,
    Copied,
    Limits,
    Looked,
    Renewed,
    Returned,
    Room,
    Started,
    Taken,
)
from bus.streams.archive import Archive
from bus.streams.connection import Answer, Arg
from bus.streams.leases import Leases
from bus.streams.memory import effects, groups, past, publishing, room, taking, verdicts
from bus.streams.memory.channels import MemoryChannels
from bus.streams.memory.connection import Direct, no_server
from bus.streams.memory.place import Place
from bus.streams.memory.reader import MemoryFollower, MemoryReader
from bus.streams.pauses import PauseTable
from bus.streams.reader import Reads
from bus.streams.replies import Reply, ReplyError
from bus.streams.rights import Refusal, Rights
from bus.streams.stream import StreamStore
from bus.streams.upkeep import Trimmed, Upkeep


class MemoryStore(StreamStore):
    """The verbs over one place."""

    calls_at_once = 1  # nothing is gained where nothing is on its way

    def __init__(self, place: Place) -> None:
        self.place = place
        self._direct = self.commands = self._publishing = Direct(place)
        self.leases = MemoryLeases(self._direct)
        self.pauses = PauseTable(self._direct)
        self.upkeep = MemoryUpkeep(self._direct)
        self.archive = MemoryArchive(self._direct)
        self.channels = MemoryChannels(self._direct, self.archive)
        self.rights = MemoryRights()

    def __str__(self) -> str:
        """Show everything that is there."""
        return str(self.place)

    @property
    def address(self) -> str:
        """The URL."""
        return f"memory://{self.place.name}"

    @property
    def clustered(self) -> bool:
        """Whether keys have slots: never."""
        return False

    def readers(self, groups: Sequence[str]) -> list[Reads]:
        """Return a reader for each group, which may wait."""
        return [MemoryReader(self.place) for _ in groups]

    def follower(self) -> MemoryFollower:
        """Return what tails share."""
        return MemoryFollower(self.place)

    # --- the way in

    def append_soon(
        self,
        stream: str,
        publisher: str,
        sequence: int,
        units: Sequence[list[Arg]],
        events: int,
        limits: Limits,
        timeout_s: float,  # noqa: ARG002 - no server keeps anybody waiting
        *,
        answer: Answer,
        follows: bool,  # noqa: ARG002 - one call at once
        at_once: bool,  # noqa: ARG002 - as above
    ) -> None:
        """Append as many whole units as fit, at most once, a turn of the loop later."""

        def go(place: Place) -> list[Reply]:
            done = publishing.append(place, stream, publisher, sequence, units, events, limits)
            return [publishing.as_answered(done)]

        self._direct.do_soon(answer, go)

    async def append(
        self,
        stream: str,
        publisher: str,
        sequence: int,
        units: Sequence[list[Arg]],
        events: int,
        limits: Limits,
        timeout_s: float,  # noqa: ARG002 - as above
        *,
        again_ms: int = 0,  # noqa: ARG002 - nothing is ever on its way
    ) -> Appended:
        """Do the same, and wait for the answer."""
        return await self._direct.do(
            publishing.append, stream, publisher, sequence, units, events, limits
        )

    async def room(
        self,
        stream: str,
        limits: Limits,
        entries: int,
        *,
        urgent: bool = True,  # noqa: ARG002 - nothing else holds it up
    ) -> Room:
        """Trim what nobody needs and say how much fits."""
        return Room(*await self._direct.do(room.room, stream, limits.keep, limits.most, entries))

    async def record_topic(self, topic: str, expected: bytes, new: bytes) -> bytes:
        """Record `new` if `expected` (b"" for nothing) still stands; return what stands now."""
        with _explaining(keys.TOPICS):
            return await self._direct.do(groups.record_topic, topic, expected, new)

    # --- verdicts

    async def ack(
        self, stream: str, group: str, consumer: str, ids: Sequence[bytes]
    ) -> list[bytes]:
        """Finish deliveries; return the ids refused."""
        return await self._direct.do(verdicts.ack, stream, group, consumer, ids)

    async def park(
        self, stream: str, group: str, consumer: str, entries: Iterable[tuple[bytes, Arg, int]]
    ) -> list[bytes]:
        """Park (id, delay_ms, delivery count to store); return lanes, b"" refused, b"lost"."""
        return await self._direct.do(verdicts.park, stream, group, consumer, list(entries))

    async def dead_letter(
        self,
        stream: str,
        group: str,
        consumer: str,
        most: int,
        entries: Iterable[tuple[bytes, list[Arg]]],
        *,
        lease: bytes | None = None,
    ) -> list[Buried]:
        """Move (id, fields of the dead letter) to the dead letters, at most `most` in all."""
        return await self._direct.do(
            verdicts.dead_letter, stream, group, consumer, most, list(entries), lease=lease
        )

    async def commit(
        self,
        target: tuple[Arg, ...],
        group: str,
        owner: str,
        touched: Iterable[str],  # noqa: ARG002 - a script must be told its keys
        sheet: Sequence[Arg],
    ) -> tuple[list[Committed], list[Looked], dict[str, int]]:
        """Apply effects and ack, all in one step per delivery; or a transaction."""
        return await self._direct.do(effects.commit, target, group, owner, sheet)

    async def renew(self, stream: str, group: str, consumer: str, ids: Sequence[bytes]) -> Renewed:
        """Reset the idle time of what is held; the delivery counts stay."""
        return await self._direct.do(verdicts.renew, stream, group, consumer, ids)

    async def start(
        self, stream: str, group: str, consumer: str, entry_id: bytes, count: int
    ) -> Started:
        """Store the count of a reclaimed delivery that is about to run."""
        return await self._direct.do(verdicts.start, stream, group, consumer, entry_id, count)

    async def claim(
        self, mark: str, home: str, stream: str, group: str, entry_id: bytes, keep_ms: int
    ) -> Claim:
        """Ask whether a delivery may handle its event, and say so in its mark."""
        return await self._direct.do(verdicts.claim, mark, home, stream, group, entry_id, keep_ms)

    async def refund(
        self, stream: str, group: str, entries: Iterable[tuple[bytes, int, int]]
    ) -> list[int]:
        """Give parked entries attempts back: (id, least delivery count, attempts)."""
        return await self._direct.do(verdicts.refund, stream, group, list(entries))

    # --- making room

    async def move_parked(
        self, stream: str, group: str, most: int, most_in_inbox: int
    ) -> tuple[int, list[str], bool]:
        """Move a group's oldest parked entries to its inbox, at most `most` and about 1 MiB."""
        return await self._direct.do(
            taking.move_parked, stream, group, most, most_in_inbox, BATCH_BYTES
        )

    async def retain(self, stream: str, retention_ms: int) -> tuple[int, dict[str, list[str]]]:
        """Trim what is older than `retention_ms` and needed by nobody, 5,000 at a time."""
        return await self._direct.do(room.retain, stream, retention_ms)

    # --- taking over

    async def recover(
        self, stream: str, group: str, consumer: str, most: int, held: Iterable[bytes]
    ) -> Taken:
        """Take up what is pending for `consumer` and not in `held`; counts stay."""
        return await self._direct.do(taking.recover, stream, group, consumer, most, list(held))

    async def take_due(
        self, stream: str, group: str, consumer: str, most: int, lanes: Sequence[bytes]
    ) -> Taken:
        """Take up to `most` entries from due lanes; counts rise."""
        return await self._direct.do(taking.take_due, stream, group, consumer, most, lanes)

    async def take_parked(
        self, stream: str, group: str, consumer: str, entries: Iterable[tuple[bytes, bytes]]
    ) -> Taken:
        """Take single entries (lane, id) out of their lanes; counts rise."""
        return await self._direct.do(taking.take_parked, stream, group, consumer, list(entries))

    async def reclaim(
        self, stream: str, group: str, consumer: str, owner: bytes, most: int, least_idle_ms: int
    ) -> Taken:
        """Take up to `most` entries of a worker that is gone; counts stay."""
        return await self._direct.do(
            taking.reclaim, stream, group, consumer, owner, most, least_idle_ms
        )


class MemoryLeases(Leases):
    """Who lives, and whose turn it is."""

    def __init__(self, direct: Direct) -> None:
        super().__init__(direct)
        self._direct = direct

    async def forget_consumer(self, stream: str, group: str, consumer: bytes) -> bool:
        """Remove a consumer that has no lease and nothing pending; True if it is gone now."""
        return await self._direct.do(groups.forget_consumer, stream, group, consumer)


class MemoryUpkeep(Upkeep):
    """What is done to groups and their entries from outside of any worker."""

    def __init__(self, direct: Direct) -> None:
        super().__init__(direct)
        self._direct = direct

    async def release(
        self, stream: str, group: str, owner: bytes, ids: Sequence[bytes]
    ) -> list[int]:
        """Let any worker take entries of a lane or a dead worker; counts stay."""
        with _explaining(stream):
            return await self._direct.do(taking.release, stream, group, owner, ids)

    async def trim(self, stream: str, cut: str, keep: int) -> Trimmed:
        """Remove what lies before the id `cut` ("" for none) and no group needs."""
        with _explaining(stream):
            return Trimmed(*await self._direct.do(room.trim_by_hand, stream, cut, keep))

    async def seek(
        self,
        stream: str,
        group: str,
        expected: str,
        to: str,
        entries_read: int | None,  # noqa: ARG002 - it is counted
        *,
        pinned: bool = False,
    ) -> str | None:
        """Set the last-delivered id of a group; return the one it had."""
        with _explaining(stream):
            return await self._direct.do(groups.seek, stream, group, expected, to, pinned=pinned)

    async def remove_group(self, stream: str, group: str) -> bool:
        """Delete a group with its inbox and dead letters; False if there was none."""
        with _explaining(stream):
            return await self._direct.do(groups.remove_group, stream, group)


class MemoryArchive(Archive):
    """What streams, inboxes and dead letters hold, and what is done with it afterwards."""

    def __init__(self, direct: Direct) -> None:
        self._connection = self._direct = direct

    async def look_at_primary(self, commands: Sequence[tuple[Arg, ...]]) -> list[Reply]:
        """Send commands that only read: there is no other place."""
        return await self.look(commands)

    async def lags(
        self,
        stream: str,
        groups: Sequence[str],
        most: int,  # noqa: ARG002 - all are counted
    ) -> dict[str, tuple[int, int]]:
        """Return per group how many entries lie before it, twice."""
        with _explaining(stream):
            return await self._direct.do(past.lags, stream, groups)

    async def replay(
        self,
        stream: str,
        group: str,
        run: str,
        known: bytes,
        most: int,
        memory_s: int,
        ids: Sequence[bytes],
    ) -> Copied | None:
        """Copy entries to a group's inbox, once per run, while it has less than `most`."""
        with _explaining(keys.inbox(stream, group)):
            return await self._direct.do(
                past.replay, stream, group, run, known, most, memory_s, ids
            )

    async def redrive(
        self,
        stream: str,
        group: str,
        run: str,
        number: int,
        most: int,
        letters: Iterable[tuple[bytes, Arg, int, Sequence[Arg]]],
    ) -> list[Returned]:
        """Move dead letters to the group's inbox while that has less than `most` entries."""
        with _explaining(keys.inbox(stream, group)):
            return await self._direct.do(
                past.redrive, stream, group, run, number, most, list(letters)
            )


class MemoryRights(Rights):
    """There are none to be had, or to lack."""

    def __init__(self) -> None:
        """Need no server."""

    async def refused(self, words: Iterable[str]) -> dict[str, Refusal] | None:  # noqa: ARG002 - nobody is forbidden anything
        """Refuse to say. Errors: NotSupported."""
        raise no_server("rights to look at")


@contextmanager
def _explaining(key: str) -> Iterator[None]:
    """Say what is wrong with a key, as the classes for servers do."""
    try:
        yield
    except ReplyError as error:
        raise error.explained(key) from None
