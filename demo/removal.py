"""What became of the dataset that was deleted: of its documents, postings and views."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from demo.ingest import ARCHIVE_ID, SourceFile, archived
from demo.ledger import Entry
from handlers.cache import dataset
from handlers.state import document_key, document_words_key, postings_key


@dataclass(frozen=True, slots=True)
class Removal:
    """What is left of the archive.

    documents: how many lay in it. told: how often each was told to be deleted. left: keys that
    should have gone.
    """

    documents: int = 0
    told: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)

    @property
    def times_told(self) -> set[int]:
        """The numbers of times that documents were told to be deleted."""
        return set(self.told.values())


async def read_removal(
    redis: Any, files: Sequence[SourceFile], entries: Iterable[Entry]
) -> Removal:
    """Look for everything that belonged to the archive, and for the events that tell of its end."""
    ids = {file.document_id for file in archived(files)}
    told = Counter(dict.fromkeys(ids, 0))
    for entry in entries:
        if entry.type == "document.deleted" and entry.event["document_id"] in ids:
            told[entry.event["document_id"]] += 1
    gone = {document_key(i) for i in ids} | {document_words_key(i) for i in ids}
    gone.add(dataset(ARCHIVE_ID).views_key)
    beginnings = (dataset(ARCHIVE_ID).key, postings_key(ARCHIVE_ID, ""))
    left = []
    async for name in redis.scan_iter(match="kb:*", count=10_000):
        key = name.decode()
        if key in gone or key.startswith(beginnings):
            left.append(key)
    return Removal(len(ids), told, left)
