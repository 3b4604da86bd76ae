"""Which streams an operation is about."""

from functools import partial
from typing import Any

from bus.history.groups import streams_with
from bus.history.patience import patiently
from bus.streams.stream import StreamStore
from bus.streams.topics import Record, TopicTable


async def records_of(topics: TopicTable, topic: str | None) -> dict[str, Record]:
    """Return streams, and what is recorded of their topics; of all topics if none is named.

    HGET or HGETALL. Errors: UnknownTopic.
    """
    if topic is None:
        records = await patiently(topics.known)
    else:
        records = {topic: await patiently(partial(topics.existing, topic))}
    return {s: r for name, r in records.items() for s in topics.streams(name, r.partitions)}


async def rows_of(
    store: StreamStore, topics: TopicTable, group: str, topic: str | None
) -> dict[str, dict[str, Any]]:
    """Return the streams that have a group, and its rows of XINFO GROUPS, of one topic or all.

    Errors: UnknownTopic, UnknownGroup.
    """
    streams = list(await records_of(topics, topic))
    return await streams_with(store, streams, group, topic)
