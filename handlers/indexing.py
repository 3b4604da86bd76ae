"""What follows from a change of a document: the inverted index of its dataset, and `search`.

Both handlers do the same thing: they bring the index to what the document is *now*. Which event
woke them, in which order, how often, and who else is at it, makes no difference:

* Before a posting is written, its word is added to the document's set of words; after it is
  removed, its word leaves the set. So the set names every posting there may be, whoever wrote it
  and wherever they crashed, and what is in it but not in the text is removed.
* At the end the status is set only if the document still has the revision that was indexed.
  If not, it is done again. So the last one to finish has indexed the last revision.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from bus import BusError, DeadLettered, Delivery, Event, Reject, event_handler
from handlers.events import (
    DocumentCreated,
    DocumentDeleted,
    DocumentIndexed,
    DocumentIndexFailed,
    DocumentUpdated,
)
from handlers.state import (
    Document,
    Fields,
    Redis,
    Status,
    change_document,
    dataset_documents_key,
    document_key,
    document_words_key,
    forget_document,
    postings_key,
    read_document,
)

MIN_WORD_CHARS = 2
MAX_WORD_CHARS = 40  # longer ones are keys, hashes and pictures in base64: nobody types them
MAX_WORDS = 10_000  # of one document, the most frequent ones; a novel has about as many
COMMANDS_PER_CALL = 500  # a few ms of Python each, and of the server less: others get their turn
ROUNDS = 20  # a document that changes this often while it is indexed is left to the retry

_WORD = re.compile(r"[^\W_]+")  # letters and digits: `read_text` is found as "read" and "text"


class TextMissing(Exception):
    """The document was announced and its text has not come yet."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A document found by `search`; a higher score is a better match."""

    document_id: str
    title: str
    score: float


# --- the handlers


async def mark_index_failed(dead: DeadLettered, bus: Any) -> None:
    """Tell the document's owner that indexing was given up, and why. May run twice."""
    try:
        event = dead.event
    except BusError:
        return  # undecodable: nothing says which document it was about
    if not isinstance(event, DocumentCreated | DocumentUpdated):
        return
    document = await read_document(bus.redis, event.document_id)
    # `new`: changed since, and the event that says so is on its way. `indexed`: another delivery
    # succeeded with it.
    if document is None or document.status not in (Status.INDEXING, Status.INDEX_FAILED):
        return
    error = f"{dead.error.type}: {dead.error.text}"
    failed = {"status": Status.INDEX_FAILED, "error": error}
    if await change_document(bus.redis, document.document_id, document.revision, failed):
        await bus.publish(
            DocumentIndexFailed(
                document_id=document.document_id, dataset_id=document.dataset_id, error=error
            )
        )


@event_handler(DocumentCreated, DocumentUpdated, group="index", on_dead=mark_index_failed)
async def index_document(
    event: DocumentCreated | DocumentUpdated, delivery: Delivery[Event]
) -> None:
    """Index the document as it is now and tell that it was done."""
    document = await _bring_up_to_date(delivery.bus.redis, event.document_id, event.dataset_id)
    if document is not None:
        await delivery.bus.publish(
            DocumentIndexed(
                document_id=document.document_id,
                dataset_id=document.dataset_id,
                words=document.words,
            )
        )


@event_handler(DocumentDeleted, group="unindex")
async def unindex_document(event: DocumentDeleted, delivery: Delivery[Event]) -> None:
    """Remove what is left of a deleted document; nothing, if it was written anew meanwhile."""
    await _bring_up_to_date(delivery.bus.redis, event.document_id, event.dataset_id)


async def _bring_up_to_date(redis: Redis, document_id: str, dataset_id: str) -> Document | None:
    """Make the index agree with the document; return it as indexed, None if it is deleted.

    Errors: TextMissing; Reject when the text is not UTF-8.
    """
    for _ in range(ROUNDS):
        document = await read_document(redis, document_id)
        if document is None or document.status is Status.DELETED:
            await _replace_postings(redis, document_id, dataset_id, Counter())
            if await _forget(redis, document_id, dataset_id, document):
                return None
        else:
            indexed = await _index(redis, document)
            if indexed is not None:
                return indexed
    raise RuntimeError(f"document {document_id} changed {ROUNDS} times while it was indexed")


async def _index(redis: Redis, document: Document) -> Document | None:
    """Index one revision; return the document as indexed, None if it has changed meanwhile."""
    document_id, seen = document.document_id, document.revision
    if not await change_document(redis, document_id, seen, {"status": Status.INDEXING}):
        return None
    # Again, as an unindexing that is under way may just have removed it.
    await redis.sadd(dataset_documents_key(document.dataset_id), document_id)
    counts = count_words(await _text_of(redis, document))
    # Also when this revision is indexed already: the one that crashed before us may have left
    # postings of an older one behind.
    await _replace_postings(redis, document_id, document.dataset_id, counts)
    indexed: Fields = {"status": Status.INDEXED, "error": "", "words": len(counts)}
    if not await change_document(redis, document_id, seen, indexed):
        return None
    return replace(document, status=Status.INDEXED, error="", words=len(counts))


async def _text_of(redis: Redis, document: Document) -> str:
    if not document.has_text:
        raise TextMissing(f"the text of document {document.document_id} has not come yet")
    text: bytes = await redis.hget(document_key(document.document_id), "text") or b""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        # No later attempt can read it. A new text comes with an event of its own.
        raise Reject(f"the text is not UTF-8: {error.reason} at byte {error.start}") from error


async def _forget(
    redis: Redis, document_id: str, dataset_id: str, document: Document | None
) -> bool:
    """Remove a document that has no postings any more; False if it was written anew meanwhile."""
    await redis.srem(dataset_documents_key(dataset_id), document_id)
    if document is None:
        return await read_document(redis, document_id) is None
    return await forget_document(redis, document_id, document.revision)


# --- words and postings


def count_words(text: str) -> Counter[str]:
    """Return how often each word that can be searched for stands in `text`."""
    counts = Counter(_WORD.findall(text.lower()))
    searchable = Counter({word: n for word, n in counts.items() if _searchable(word)})
    return Counter(dict(searchable.most_common(MAX_WORDS)))


def _searchable(word: str) -> bool:
    return MIN_WORD_CHARS <= len(word) <= MAX_WORD_CHARS and not word.isdigit()


async def _replace_postings(
    redis: Redis, document_id: str, dataset_id: str, counts: Counter[str]
) -> None:
    """Let exactly the words of `counts` lead to the document."""
    words_key = document_words_key(document_id)
    for some in _portions(counts):
        pipeline = redis.pipeline(transaction=False)
        pipeline.sadd(words_key, *some)  # first: see the head of this file
        for word in some:
            weight = 1 + math.log(counts[word])  # the hundredth mention adds less than the first
            pipeline.zadd(postings_key(dataset_id, word), {document_id: weight})
        await pipeline.execute()
    recorded = {word.decode() for word in await redis.smembers(words_key)}
    for some in _portions(recorded - counts.keys()):
        pipeline = redis.pipeline(transaction=False)
        for word in some:
            pipeline.zrem(postings_key(dataset_id, word), document_id)
        pipeline.srem(words_key, *some)  # last: likewise
        await pipeline.execute()


def _portions(words: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(words)
    while some := list(islice(rest, COMMANDS_PER_CALL)):
        yield some


# --- searching


async def search(redis: Redis, dataset_id: str, words: str, limit: int = 10) -> list[Hit]:
    """Return the documents of a dataset in which any of `words` stands, best match first.

    A word counts for more the rarer it is in the dataset, and the more often it stands in the
    document. Reads every posting of every word: right for thousands of documents, not millions.
    """
    terms = list(count_words(words))
    pipeline = redis.pipeline(transaction=False)
    pipeline.scard(dataset_documents_key(dataset_id))
    for word in terms:
        pipeline.zcard(postings_key(dataset_id, word))
    documents, *frequencies = await pipeline.execute()
    weights = {
        postings_key(dataset_id, word): math.log(1 + documents / frequency)
        for word, frequency in zip(terms, frequencies, strict=True)
        if frequency
    }
    if not weights:
        return []
    found = await redis.zunion(weights, withscores=True)
    ranked = sorted(found, key=lambda pair: (-pair[1], pair[0]))
    return await _hits(redis, ranked, limit)


async def _hits(redis: Redis, ranked: list[tuple[bytes, float]], limit: int) -> list[Hit]:
    """Look the documents up, best first, leaving out those deleted since they were indexed."""
    hits: list[Hit] = []
    for document_id, score in ranked:
        if len(hits) == limit:
            break
        document = await read_document(redis, document_id.decode())
        if document is not None and document.status is not Status.DELETED:
            hits.append(Hit(document.document_id, document.title, score))
    return hits
