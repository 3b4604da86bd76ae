"""What an operator does, in one place; each is one line here and has a module of its own."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Unpack

from msgspec import UNSET, UnsetType

from bus.admin import consumers, doctor, groups, marks, pauses, trim
from bus.admin.checks import Checked, CheckName, Limit
from bus.admin.diagnosis import Diagnosis
from bus.admin.pending import PendingEntries, PendingFilters
from bus.history.inspector import Inspector
from bus.history.position import Position
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable
from bus.telemetry import Telemetry
from bus.topic import OnFull


class Admin:
    """Changes topics, groups, consumers and what is pending; made by `Bus.admin`.

    Wherever a group is named, `topic` is the one topic that is meant; None for all that have it.
    dry_run: look, and say what would be done. Errors of all of them: UnknownTopic, UnknownGroup,
    DeclarationError, ServerError.
    """

    def __init__(
        self, store: StreamStore, topics: TopicTable, inspector: Inspector, telemetry: Telemetry
    ) -> None:
        self._store = store
        self._topics = topics
        self._inspector = inspector
        self._telemetry = telemetry

    # --- topics

    async def set_marks(
        self,
        topic: str,
        *,
        maxlen: int | None = None,
        keep: int | None = None,
        on_full: OnFull | None = None,
        retention: timedelta | UnsetType | None = UNSET,
        dry_run: bool = False,
    ) -> marks.Marked:
        """Change what is recorded of a topic; what is not given stays. See `Topic` for the marks.

        retention: None for no limit. Running processes go by it within 5 to 10 seconds. It counts
        as declared from then on: what processes declare otherwise is told, and does not hold.
        HGET, and one script that writes unless somebody wrote meanwhile.
        """
        return await marks.set_marks(
            self._store,
            self._topics,
            self._telemetry,
            topic,
            maxlen=maxlen,
            keep=keep,
            on_full=on_full,
            retention=retention,
            dry_run=dry_run,
        )

    async def trim(
        self,
        topic: str,
        *,
        before: Position = None,
        keep: int | None = None,
        dry_run: bool = False,
    ) -> trim.Trimmed:
        """Remove the oldest entries of every stream, as far as no group needs them.

        before: the position of the first that stays; as of `history`. keep: so many of each stream
        stay at least. With both, both hold. `trim.lua`, about 5,000 entries a call.
        """
        return await trim.trim(
            self._store,
            self._topics,
            self._telemetry,
            topic,
            before=before,
            keep=keep,
            dry_run=dry_run,
        )

    # --- groups

    async def create_group(
        self, group: str, topic: str, *, at: Position = "start"
    ) -> groups.Created:
        """Make a group, and its inbox, on every stream of a topic; one that is there stays.

        at: the first entry that it is given; "end" for what comes from now on. XGROUP CREATE.
        """
        return await groups.create(self._store, self._topics, self._telemetry, group, topic, at)

    async def seek_group(
        self,
        group: str,
        to: Position | tuple[groups.Sought, ...],
        topic: str | None = None,
        *,
        dry_run: bool = False,
    ) -> tuple[groups.Sought, ...]:
        """Set which entry a group is given next, while its workers run or not.

        to: that entry, or the first after a time; "end" skips all there is. Or what a dry run
        said: then that is done, where the group has not come past it by itself. What was given
        to it and is not finished stays pending, and is given again if it lies beyond.
        Forwards, entries are skipped for good; backwards, they are handled again: a replay does
        that, too, with a filter, a rate, and without holding up what is new. `seek.lua`; after a
        lost answer it is set again, and what was given to it meanwhile is given once more.
        """
        return await groups.seek(
            self._store, self._topics, self._telemetry, group, topic, to, dry_run=dry_run
        )

    async def recount_group(
        self, group: str, topic: str | None = None, *, dry_run: bool = False
    ) -> tuple[groups.Sought, ...]:
        """Tell the server how many entries a group has passed, where it has lost count.

        It is given the same entries as before. `seek.lua`; it counts up to 100,000 entries from the
        nearer end of the stream. A group that reads on meanwhile is counted again, 10 times at
        most: pause one that is busy. Redis 6.2 keeps no count.
        """
        return await groups.recount(self._store, self._topics, group, topic, dry_run=dry_run)

    async def remove_group(
        self, group: str, topic: str | None = None, *, dry_run: bool = False
    ) -> tuple[groups.Removed, ...]:
        """Delete a group with its inbox, its dead letters and its pauses.

        What it had not handled is nobody's then, and goes when it is old. `remove_group.lua`.
        Errors: InUse while a worker serves it, which would make it again from the beginning.
        """
        return await groups.remove(
            self._store,
            self._topics,
            self._telemetry,
            group,
            topic,
            dry_run=dry_run,
        )

    async def pause_group(
        self,
        group: str,
        topic: str | None = None,
        *,
        until: datetime | timedelta | None = None,
        why: str = "",
    ) -> tuple[pauses.PausedGroup, ...]:
        """Have nothing of a group start any more; what runs goes on. It survives restarts.

        Workers notice within about a second, and keep their leases. until: when it ends by itself,
        None for when it is resumed. why: to be shown. Of a group that is paused it changes the end,
        and what is said, if anything is.
        Says when publishers will feel it: the group needs all that comes meanwhile. HSET.
        """
        return await pauses.pause(
            self._store, self._topics, self._inspector, group, topic, until, why
        )

    async def resume_group(self, group: str, topic: str | None = None) -> tuple[str, ...]:
        """Let a group go on; return the topics on which it was paused. HDEL."""
        return await pauses.resume(self._store, self._topics, group, topic)

    async def paused_topics(self, group: str) -> frozenset[str]:
        """Return the topics on which a group is paused now. TIME, HGETALL."""
        return await pauses.paused_topics(self._store, group)

    # --- consumers

    async def remove_consumer(
        self, name: str, group: str, topic: str | None = None, *, dry_run: bool = False
    ) -> Sequence[consumers.RemovedConsumer]:
        """Remove a consumer whose worker is gone; any worker may take at once what it had.

        `release.lua`, `forget_consumer.lua`. Errors: InUse while it is at work, by its lease, or if
        it keeps none, if the server has heard of it within the last minute.
        """
        return await consumers.remove_consumer(
            self._store, self._topics, self._telemetry, name, group, topic, dry_run=dry_run
        )

    # --- pending

    def pending(
        self, group: str, topic: str | None = None, **filters: Unpack[PendingFilters]
    ) -> PendingEntries:
        """Return what a group has pending, to be listed, shown, retried or given up.

        filters: types, state, owner, min_idle_s, min_attempts, ids: see `PendingEntries`.
        Nothing is read yet.
        """
        return PendingEntries(self._store, self._topics, self._telemetry, group, topic, **filters)

    # --- what is wrong

    async def examine(self, roles: Iterable[str] = doctor.EXAMINED_ROLES) -> Diagnosis:
        """Look for whatever is wrong with server and bus, and say what mends it; changes nothing.

        It may be asked of a bus that was never entered (`bus = Bus.connect(url)`), and does not
        raise for a server that is away, refuses the password, loads or takes no writes: that is
        the one finding then. roles: of docs/wire.md, for which the rights of the user are judged.
        A snapshot as of `Bus.inspect`; PING, INFO, CONFIG GET, TIME, and MULTI ... DISCARD for the
        rights; TYPE per key. One round trip more per stream whose groups have something to be
        given (`lags.lua`), two per stream and group with dead letters (XREVRANGE, 256 KiB).
        """
        return await doctor.examine(self._store, self._inspector, roles)

    async def check(
        self,
        name: CheckName,
        *,
        topics: Iterable[str] | None = None,
        groups: Iterable[str] | None = None,
        warn: str | Limit | None = None,
        crit: str | Limit | None = None,
    ) -> Checked:
        """Compare `lag`, `pending`, `dead` or `workers` of each group with limits, for a monitor.

        topics, groups: these alone. warn, crit: "1000" entries, or an age such as "5m"; by default
        those of `bus/admin/checks.py`, and who gives one of the two has no other. What cannot be
        looked at, or is not there, is UNKNOWN and says why. A snapshot as of `Bus.inspect`.
        Errors: DeclarationError for limits and names that cannot be.
        """
        return await doctor.check(
            self._store, self._topics, self._inspector, name, topics, groups, warn, crit
        )
