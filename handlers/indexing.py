"""What follows from a change of a document: the inverted index of its dataset, and `search`.

Both handlers do the same thing: they bring the index to what the document is *now*. Which event
woke them, in which order, how often, and who else is at it, makes no difference:

* Whatever changes a document's revision publishes an event in the same step. So a handler answers
  for the revision that it has read, and for no later one: that has an event of its own.
* A posting is written or removed, and the status set, only in a step that finds the document
  `unchanged`. So from the moment a revision changes, nobody who has read an older one does
  anything any more: not one that is slow, nor one that was paused and replaced, nor one whose
  effects take place after it has looked for the last time.
* The same step notes in the document's set of words under which words a posting lies. So the next
  one finds in it what the others have written before they crashed or were overtaken, and removes
  what is not in the text. It reads the set after it has read the revision: nobody adds to it then
  but those who index the same text.
* Two that index the same revision write the same postings. The status and `document.indexed` are
  effects, conditional on the status, too: a revision is told to be indexed once.
* A deleted document has a revision of its own, for which nobody writes postings; its hash goes, by
  an effect, when they are all removed. So where there is no hash, there are no postings.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from bus import Bus, BusError, DeadLettered, Delivery, Event, Reject, event_handler
from handlers import cache
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
    dataset_documents_key,
    document_key,
    document_words_key,
    postings_key,
    read_document,
    read_documents,
    unchanged,
)

MIN_WORD_CHARS = 2
MAX_WORD_CHARS = 40  # longer ones are keys, hashes and pictures in base64: nobody types them
MAX_WORDS = 10_000  # of one document, the most frequent ones; a novel has about as many
WORDS_PER_STEP = 400  # a few ms of Python each, and of the server less: others get their turn

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


async def mark_index_failed(dead: DeadLettered, bus: Bus) -> None:
    """Tell the document's owner that indexing was given up, and why; once for each revision.

    When another delivery is still at it and succeeds, `document.indexed` follows.
    """
    try:
        event = dead.event
    except BusError:
        return  # undecodable: nothing says which document it was about
    if not isinstance(event, DocumentCreated | DocumentUpdated):
        return
    document = await read_document(bus.redis, event.document_id)
    if document is None:
        return
    error = f"{dead.error.type}: {dead.error.text}"
    key = document_key(document.document_id)
    async with bus.transaction() as change:
        # `new`: changed since, and the event that says so is on its way. `indexed`: another
        # delivery succeeded with it. `index_failed`: a worker that died has told it.
        given_up = unchanged(change, document) & change.hget(key, "status").equals(Status.INDEXING)
        change.hset(key, {"status": Status.INDEX_FAILED, "error": error}, when=given_up)
        change.publish(
            DocumentIndexFailed(
                document_id=document.document_id, dataset_id=document.dataset_id, error=error
            ),
            when=given_up,
        )


@event_handler(DocumentCreated, DocumentUpdated, group="index", on_dead=mark_index_failed)
async def index_document(
    event: DocumentCreated | DocumentUpdated, delivery: Delivery[Event]
) -> None:
    """Index the document as it is now and tell that it was done.

    Errors: TextMissing; Reject when the text is not UTF-8.
    """
    bus = delivery.bus
    document = await read_document(bus.redis, event.document_id)
    if document is None or document.status is Status.DELETED:
        return
    key = document_key(document.document_id)
    async with bus.transaction() as change:
        new = unchanged(change, document) & change.hget(key, "status").equals(Status.NEW)
        change.hset(key, {"status": Status.INDEXING}, when=new)
    counts = count_words(await _text_of(bus.redis, document))
    # Also when it is indexed already: that is how an index is made again, by replaying the events.
    if not await _replace_postings(bus, document, counts):
        return
    effects = delivery.effects
    same, status = unchanged(effects, document), effects.hget(key, "status")
    done: Fields = {"status": Status.INDEXED, "error": "", "words": len(counts)}
    effects.hset(key, done, when=same)
    effects.publish(
        DocumentIndexed(
            document_id=document.document_id, dataset_id=document.dataset_id, words=len(counts)
        ),
        when=same & status.differs(Status.INDEXED),
    )


@event_handler(DocumentDeleted, group="unindex")
async def unindex_document(event: DocumentDeleted, delivery: Delivery[Event]) -> None:
    """Remove what is left of a deleted document; nothing, if it was written anew meanwhile."""
    bus = delivery.bus
    document = await read_document(bus.redis, event.document_id)
    if document is None or document.status is not Status.DELETED:
        return
    if not await _replace_postings(bus, document, Counter()):
        return
    effects = delivery.effects
    effects.delete(document_key(document.document_id), when=unchanged(effects, document))
    cache.drop_views(effects, cache.dataset(document.dataset_id))  # words are rarer now


async def _text_of(redis: Redis, document: Document) -> str:
    if not document.has_text:
        raise TextMissing(f"the text of document {document.document_id} has not come yet")
    text: bytes = await redis.hget(document_key(document.document_id), "text") or b""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        # No later attempt can read it. A new text comes with an event of its own.
        raise Reject(f"the text is not UTF-8: {error.reason} at byte {error.start}") from error


# --- words and postings


def count_words(text: str) -> Counter[str]:
    """Return how often each word that can be searched for stands in `text`."""
    counts = Counter(_WORD.findall(text.lower()))
    searchable = Counter({word: n for word, n in counts.items() if _searchable(word)})
    return Counter(dict(searchable.most_common(MAX_WORDS)))


def _searchable(word: str) -> bool:
    return MIN_WORD_CHARS <= len(word) <= MAX_WORD_CHARS and not word.isdigit()


async def _replace_postings(bus: Bus, document: Document, counts: Counter[str]) -> bool:
    """Let exactly the words of `counts` lead to the document; False if it has changed meanwhile."""
    document_id, words_key = document.document_id, document_words_key(document.document_id)
    for some in _portions(counts):
        async with bus.transaction() as change:
            same = unchanged(change, document)
            noted = change.sadd(words_key, *some, when=same)
            for word in some:
                weight = 1 + math.log(
                    counts[word]
                )  # the hundredth mention adds less than the first
                key = postings_key(document.dataset_id, word)
                change.zadd(key, {document_id: weight}, when=same)
        if noted.skipped:
            return False
    redis: Redis = bus.redis
    written = {word.decode() for word in await redis.smembers(words_key)}
    for some in _portions(written - counts.keys()):
        async with bus.transaction() as change:
            same = unchanged(change, document)
            for word in some:
                change.zrem(postings_key(document.dataset_id, word), document_id, when=same)
            noted = change.srem(words_key, *some, when=same)
        if noted.skipped:
            return False
    return True


def _portions(words: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(words)
    while some := list(islice(rest, WORDS_PER_STEP)):
        yield some


# --- searching


async def search(redis: Redis, dataset_id: str, words: str, limit: int = 10) -> list[Hit]:
    """Return the documents of a dataset in which any of `words` stands, best match first.

    `DatasetService.search` answers from what was found a moment ago.

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
    for start in range(0, len(ranked), limit):
        scores = {i.decode(): score for i, score in ranked[start : start + limit]}
        for document in await read_documents(redis, list(scores)):
            if document is not None and document.status is not Status.DELETED:
                found = Hit(document.document_id, document.title, scores[document.document_id])
                hits.append(found)
        if len(hits) >= limit:
            break
    return hits[:limit]
