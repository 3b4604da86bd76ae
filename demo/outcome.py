"""What the run came to, and the counts that have to agree."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from demo import poison
from demo.accounts import Accounts, read_accounts
from demo.crew import Crew
from demo.ingest import DATASET_ID, SourceFile, archived, deleted, kept
from demo.ledger import GROUPS, Book, Entry, GroupRecord, read_group, read_streams
from demo.removal import Removal, read_removal
from demo.takeover import Takeover
from demo.views import Views
from handlers.indexing import Hit, search
from handlers.state import document_key, document_words_key

HITS = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything the report is made of.

    statuses: documents by status, `gone` for those without a hash.
    findable: documents that are deleted and still have postings on record.
    retries_logged: failed attempts by group, as the workers logged them.
    """

    book: Book
    entries: list[Entry]
    groups: list[GroupRecord]
    takeover: Takeover
    accounts: Accounts
    removal: Removal
    views: Views
    late_event_id: str
    statuses: Counter[str]
    expected_statuses: Counter[str]
    findable: int
    retries_logged: Counter[str]
    exit_codes: list[int]
    searches: list[tuple[str, list[Hit]]]


async def read_outcome(
    redis: Any,
    files: Sequence[SourceFile],
    book: Book,
    takeover: Takeover,
    views: Views,
    crew: Crew,
    searches: Iterable[str],
) -> Outcome:
    """Read the record, the streams and the documents; search."""
    entries = await read_streams(redis)
    gone = [file.document_id for file in {*deleted(files), *archived(files)}]
    there = [file.document_id for file in kept(files)]
    failing = [*poison.NOT_UTF8, *poison.NEVER_UPLOADED]
    return Outcome(
        book=book,
        entries=entries,
        groups=[await read_group(redis, handler, book, entries) for handler in GROUPS],
        takeover=takeover,
        accounts=await read_accounts(redis, entries),
        removal=await read_removal(redis, files, entries),
        views=views,
        late_event_id=poison.late_event_id(book),
        statuses=await _statuses(redis, [*gone, *there, *failing, poison.UPLOADED_LATE]),
        expected_statuses=Counter(
            indexed=len(there) + 1, index_failed=len(failing), gone=len(gone)
        ),
        findable=await _findable(redis, gone),
        retries_logged=Counter(e["group"] for e in crew.emitted("delivery.retried")),
        exit_codes=crew.exit_codes,
        searches=[(words, await search(redis, DATASET_ID, words, HITS)) for words in searches],
    )


async def _statuses(redis: Any, document_ids: Iterable[str]) -> Counter[str]:
    pipeline = redis.pipeline(transaction=False)
    for document_id in document_ids:
        pipeline.hget(document_key(document_id), "status")
    return Counter("gone" if s is None else s.decode() for s in await pipeline.execute())


async def _findable(redis: Any, document_ids: Iterable[str]) -> int:
    pipeline = redis.pipeline(transaction=False)
    for document_id in document_ids:
        pipeline.exists(document_words_key(document_id))
    return sum(await pipeline.execute())


# --- the counts


@dataclass(frozen=True, slots=True)
class Check:
    """A count and what it has to be."""

    what: str
    expected: object
    found: object

    @property
    def agrees(self) -> bool:
        """Whether it is what it has to be."""
        return self.expected == self.found


def checks(outcome: Outcome) -> Iterator[Check]:
    """Yield every count that has to agree."""
    book, index = outcome.book, outcome.groups[0]
    yield Check(
        "entries in the streams, without what handlers published",
        len(book.entries) + len(book.raw),
        sum(not entry.by_handler for entry in outcome.entries),
    )
    by_handlers = [entry.event_id for entry in outcome.entries if entry.by_handler]
    twice = len(by_handlers) - len(set(by_handlers))
    yield Check("events that handlers published twice", 0, twice)
    for record in outcome.groups:
        yield from _group_checks(record, outcome)
    yield Check(
        "events document.index_failed",
        index.reasons["failed"] + index.reasons["rejected"],
        len({e.event_id for e in outcome.entries if e.type == "document.index_failed"}),
    )
    late, enough = outcome.late_event_id, poison.LATE_AFTER_FAILURES
    yield Check(
        f"the text that came late: failed {enough} times or more, then handled",
        (True, True),
        (index.failed.get(late, 0) >= enough, late in index.handled_at_ms),
    )
    yield Check("documents by status", outcome.expected_statuses, outcome.statuses)
    yield Check("deleted documents that can still be found", 0, outcome.findable)
    yield from _state_checks(outcome)
    yield Check(
        "entries taken over from the killed worker",
        len(outcome.takeover.held),
        outcome.takeover.reclaimed,
    )
    yield Check("exit codes of the workers", {0}, set(outcome.exit_codes))
    yield Check(
        "searches without a hit", [], [words for words, hits in outcome.searches if not hits]
    )


def _state_checks(outcome: Outcome) -> Iterator[Check]:
    accounts, removal, views = outcome.accounts, outcome.removal, outcome.views
    balances = accounts.expected_balances
    yield Check("balances: granted minus the tokens of the messages", balances, accounts.balances)
    yield Check("quota.exceeded, by user", accounts.expected_told, accounts.told)
    charging = outcome.takeover.messages > 0
    yield Check("the killed worker was charging messages", expected=True, found=charging)
    yield Check("keys left of the deleted dataset", [], removal.left[:HITS])
    once = {1} if removal.documents else set()
    yield Check("document.deleted, per document of the deleted dataset", once, removal.times_told)
    yield Check("searches that the cache answered wrongly", 0, views.wrong)
    yield Check("the cache answered some searches", expected=True, found=views.hits > 0)


def _group_checks(record: GroupRecord, outcome: Outcome) -> Iterator[Check]:
    group = record.group
    yield Check(f"{group}: lost", 0, len(record.lost))
    expected = poison.DEAD_LETTERS[group]
    yield Check(f"{group}: dead letters by reason", expected, dict(record.reasons))
    held = sum(holder == group for holder, _ in outcome.takeover.held)
    yield Check(
        f"{group}: failed attempts logged as retried, when the killed worker had {held} in hand",
        min(max(outcome.retries_logged[group], record.retried - held), record.retried),
        outcome.retries_logged[group],
    )
    yield Check(
        f"{group}: runs cut off, when the killed worker had {held} in hand",
        min(max(record.cut_off, 0), held),
        record.cut_off,
    )
