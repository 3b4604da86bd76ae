"""Entries and documents that fail, each in its own way."""

from typing import Any

from bus.streams import keys
from demo import records, workload
from demo.ingest import CREATES, DATASET_ID, Ingest
from demo.ledger import Book
from demo.watch import until

POISON = "poison"
LATE_AFTER_FAILURES = 2

NOT_UTF8 = ("not-utf8-1", "not-utf8-2", "not-utf8-3", "not-utf8-4")
NEVER_UPLOADED = ("never-uploaded-1", "never-uploaded-2")
UPLOADED_LATE = "uploaded-late"

# Written by hand, past the publisher: broken JSON, a missing field, an entry of another program.
BY_HAND: tuple[dict[str, str], ...] = (
    {"id": "by-hand-1", "type": "document.created", "data": '{"document_id": "x'},
    {"id": "by-hand-2", "type": "document.created", "data": '{"document_id": "x"}'},
    {"temperature": "21.5"},
)


# What has to be in the dead letters of each group in the end, by reason. `unindex` did not ask
# for the type that the first two claim; the third claims none, so everybody who reads it has to
# answer for it. `quota` and `cleanup` read other streams.
DEAD_LETTERS = {
    "index": {
        "undecodable": len(BY_HAND),
        "rejected": len(NOT_UTF8),
        "failed": len(NEVER_UPLOADED),
    },
    "unindex": {"undecodable": 1},
    "quota": {},
    "cache": {"undecodable": len(BY_HAND)},
    "cleanup": {},
    "audit": {"undecodable": len(BY_HAND)},
}


async def inject(redis: Any, ingest: Ingest) -> None:
    """Publish all of it; return when the late text has been uploaded."""
    for number, fields in enumerate(BY_HAND):
        stream = keys.stream("document", number % workload.documents.partitions)
        entry_id = await redis.xadd(stream, fields)
        ingest.book.raw.append(((stream, entry_id.decode()), fields.get("type")))
    create = ingest.documents.create
    for name in NOT_UTF8:
        await ingest.publish(POISON, CREATES, create, name, DATASET_ID, name, b"caf\xe9")
    for name in (*NEVER_UPLOADED, UPLOADED_LATE):
        await ingest.publish(POISON, CREATES, create, name, DATASET_ID, name)
    await _upload_late(redis, ingest)


async def _upload_late(redis: Any, ingest: Ingest) -> None:
    """Bring the text of an announced document after its indexing has failed twice."""
    event_id = late_event_id(ingest.book)

    async def failed_enough() -> bool:
        failures = await redis.hget(records.failed("index"), event_id)
        return int(failures or 0) >= LATE_AFTER_FAILURES

    await until(failed_enough)
    update, text = ingest.documents.update, b"better late than never"
    await ingest.publish(POISON, ["document.updated"], update, UPLOADED_LATE, text=text)


def late_event_id(book: Book) -> str:
    """Return the id of the event that announced the late document: the last one created here."""
    created = [e for e in book.entries if e.phase == POISON and e.type == CREATES[0]]
    return created[-1].event_id
