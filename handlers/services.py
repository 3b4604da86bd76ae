"""What a program calls: each method changes the state and tells what happened, in one step.

`bus.transaction()` makes one step of the two, so they never part: no state without its event, and
no event that comes before its state. What has to hold for a change (the dataset is there, the
document is the one that was read) is a condition of the step, so it holds when the change is made.

Every method may be called twice, as by a caller that got no answer in time. Callers choose the
ids. Changing methods return the receipt of what they published.

Questions with costly answers go through `cache.Cache`: they may show what was a moment ago.
"""

from dataclasses import astuple, dataclass
from operator import itemgetter
from typing import Any

from bus import Bus, Receipt
from handlers import cache
from handlers.cleanup import delete_dataset, delete_document
from handlers.events import (
    AppCreated,
    AppDeleted,
    AppUpdated,
    DatasetCreated,
    DatasetDeleted,
    DatasetDocumentAdded,
    DocumentCreated,
    DocumentDeleted,
    DocumentUpdated,
    MessageCreated,
    QuotaExceeded,
    QuotaGranted,
)
from handlers.indexing import Hit, count_words, search
from handlers.state import (
    Document,
    Fields,
    Redis,
    Status,
    app_datasets_key,
    app_key,
    checked_id,
    dataset_documents_key,
    dataset_key,
    document_key,
    message_key,
    new_revision,
    quota_key,
    read_document,
    read_documents,
    unchanged,
)

MAX_TEXT_BYTES = 1_000_000  # a document is written in one step, which takes at most 1 MiB
MAX_TITLE_CHARS = 500  # the title travels in events
MAX_MESSAGE_CHARS = 100_000  # a longer one is a document
CHARS_PER_TOKEN = 4  # what most tokenizers come to in English; an estimate is all we need


@dataclass(frozen=True, slots=True)
class Title:
    """What a list shows: a thing's id and its name or title."""

    id: str
    title: str


@dataclass(frozen=True, slots=True)
class App:
    """An app and its datasets."""

    app_id: str
    name: str
    datasets: tuple[Title, ...]


class AppService:
    """Apps: what users build and talk to."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.cache = cache.Cache(bus)

    async def get(self, app_id: str) -> App | None:
        """Return an app as it was a moment ago, None if there is none."""
        view = await self.cache.read(cache.app(app_id), "app", lambda: self._load(app_id))
        if view is None:
            return None
        name, datasets = view
        return App(app_id, name, tuple(Title(*row) for row in datasets))

    async def create(self, app_id: str, name: str) -> Receipt:
        """Create an app, or give the one with this id its first name again.

        Errors: ValueError for a bad id, or one whose app was deleted and has datasets left.
        """
        key = app_key(checked_id(app_id, "app id"))
        async with self.bus.transaction() as change:
            left = change.exists(app_datasets_key(app_id))
            change.hsetnx(key, "name", name, when=left.equals(0))
            there = change.exists(key).equals(1)
            change.hset(key, {"name": name}, when=there)
            change.publish(AppCreated(app_id=app_id, name=name), when=there)
        if not change.receipts:
            raise ValueError(f"app {app_id!r} is still being deleted")
        return change.receipts[0]

    async def update(self, app_id: str, name: str) -> Receipt:
        """Rename an app. Errors: LookupError."""
        async with self.bus.transaction() as change:
            there = change.exists(app_key(app_id)).equals(1)
            change.hset(app_key(app_id), {"name": name}, when=there)
            change.publish(AppUpdated(app_id=app_id, name=name), when=there)
        if not change.receipts:
            raise LookupError(f"there is no app {app_id!r}")
        return change.receipts[0]

    async def delete(self, app_id: str) -> Receipt:
        """Delete an app, also one that is gone; its datasets follow (cleanup.py)."""
        async with self.bus.transaction() as change:
            change.delete(app_key(app_id))
            change.publish(AppDeleted(app_id=app_id))
        return change.receipts[0]

    async def _load(self, app_id: str) -> list[Any] | None:
        redis: Redis = self.bus.redis
        name = await redis.hget(app_key(app_id), "name")
        if name is None:
            return None
        dataset_ids = sorted(i.decode() for i in await redis.smembers(app_datasets_key(app_id)))
        pipeline = redis.pipeline(transaction=False)
        for dataset_id in dataset_ids:
            pipeline.hget(dataset_key(dataset_id), "name")
        names = await pipeline.execute()
        rows = [(i, n.decode()) for i, n in zip(dataset_ids, names, strict=True) if n is not None]
        return [name.decode(), rows]


class DatasetService:
    """Datasets: what an app answers from."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.cache = cache.Cache(bus)

    async def search(self, dataset_id: str, words: str, limit: int = 10) -> list[Hit]:
        """Return what `indexing.search` found a moment ago. Errors: ValueError for a limit < 1."""
        if limit < 1:
            raise ValueError(f"a search returns at least 1 hit, not {limit}")
        terms = " ".join(sorted(count_words(words)))

        async def load() -> list[Any]:
            return [astuple(hit) for hit in await search(self.bus.redis, dataset_id, words, limit)]

        rows = await self.cache.read(cache.dataset(dataset_id), f"search:{limit}:{terms}", load)
        return [Hit(*row) for row in rows]

    async def documents(self, dataset_id: str) -> list[Title]:
        """Return the titles of a dataset's documents as they were a moment ago, by title."""

        async def load() -> list[Any]:
            redis: Redis = self.bus.redis
            ids = [i.decode() for i in await redis.smembers(dataset_documents_key(dataset_id))]
            found = [d for d in await read_documents(redis, ids) if d is not None]
            there = [d for d in found if d.status is not Status.DELETED]
            return sorted(((d.document_id, d.title) for d in there), key=itemgetter(1, 0))

        rows = await self.cache.read(cache.dataset(dataset_id), "documents", load)
        return [Title(*row) for row in rows]

    async def create(self, dataset_id: str, app_id: str, name: str) -> Receipt:
        """Create an empty dataset of an app, or rename the one with this id.

        Errors: ValueError for a bad id, another app's dataset, or a deleted one that has documents
        left; LookupError when there is no such app.
        """
        key = dataset_key(checked_id(dataset_id, "dataset id"))
        async with self.bus.transaction() as change:
            app = change.exists(app_key(app_id))
            left = change.exists(dataset_documents_key(dataset_id))
            change.hsetnx(key, "app_id", app_id, when=app.equals(1) & left.equals(0))
            owner = change.hget(key, "app_id")
            ours = app.equals(1) & owner.equals(app_id)
            change.hset(key, {"name": name}, when=ours)
            change.sadd(app_datasets_key(app_id), dataset_id, when=ours)
            created = DatasetCreated(dataset_id=dataset_id, app_id=app_id, name=name)
            change.publish(created, when=ours)
        if change.receipts:
            return change.receipts[0]
        if not app.value:
            raise LookupError(f"there is no app {app_id!r}")
        if owner.value is None:
            raise ValueError(f"dataset {dataset_id!r} is still being deleted")
        raise ValueError(f"dataset {dataset_id!r} belongs to app {owner.value.decode()!r}")

    async def delete(self, dataset_id: str) -> Receipt:
        """Delete a dataset, also one that is gone; its documents follow (cleanup.py)."""
        key = dataset_key(dataset_id)
        while True:
            app_id: Any = await self.bus.redis.hget(key, "app_id")
            async with self.bus.transaction() as change:
                if app_id is not None:
                    delete_dataset(change, dataset_id, app_id.decode())
                else:
                    gone = change.exists(key).equals(0)
                    change.publish(DatasetDeleted(dataset_id=dataset_id), when=gone)
            if change.receipts:
                return change.receipts[0]


class DocumentService:
    """Documents: texts that can be found by their words once they are indexed."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def get(self, document_id: str) -> Document | None:
        """Return the document as it is now, None if there is none."""
        return await read_document(self.bus.redis, document_id)

    async def create(
        self, document_id: str, dataset_id: str, title: str, text: bytes | None = None
    ) -> list[Receipt]:
        """Create a document, or write the one with this id anew; two events.

        text: UTF-8. None announces a document whose text comes later, with `update`; until then
        indexing it fails and is tried again.
        Errors: ValueError for a bad id, a text or title too long, another dataset's document;
        LookupError when there is no such dataset.
        """
        checked_id(dataset_id, "dataset id")
        key = document_key(checked_id(document_id, "document id"))
        fields = {**_title_and_status(title), **_text(text)}
        async with self.bus.transaction() as change:
            dataset = change.exists(dataset_key(dataset_id))
            change.hsetnx(key, "dataset_id", dataset_id, when=dataset.equals(1))
            owner = change.hget(key, "dataset_id")
            ours = dataset.equals(1) & owner.equals(dataset_id)
            change.hset(key, fields, when=ours)
            change.sadd(dataset_documents_key(dataset_id), document_id, when=ours)
            created = DocumentCreated(document_id=document_id, dataset_id=dataset_id, title=title)
            change.publish(created, when=ours)
            added = DatasetDocumentAdded(dataset_id=dataset_id, document_id=document_id)
            change.publish(added, when=ours)
        if change.receipts:
            return change.receipts
        if not dataset.value:
            raise LookupError(f"there is no dataset {dataset_id!r}")
        raise ValueError(f"document {document_id!r} belongs to {owner.value.decode()!r}")

    async def update(
        self, document_id: str, *, title: str | None = None, text: bytes | None = None
    ) -> Receipt:
        """Change title, text or both; what is None stays.

        Errors: ValueError; LookupError, also when its dataset was deleted.
        """
        while True:
            present = await self.get(document_id)
            if present is None or present.status is Status.DELETED:
                raise LookupError(f"there is no document {document_id!r}")
            new_title = present.title if title is None else title
            fields = {**_title_and_status(new_title), **({} if text is None else _text(text))}
            async with self.bus.transaction() as change:
                dataset = change.exists(dataset_key(present.dataset_id))
                same = unchanged(change, present) & dataset.equals(1)
                change.hset(document_key(document_id), fields, when=same)
                change.publish(
                    DocumentUpdated(
                        document_id=document_id, dataset_id=present.dataset_id, title=new_title
                    ),
                    when=same,
                )
            if change.receipts:
                return change.receipts[0]
            if not dataset.value:
                raise LookupError(f"there is no dataset {present.dataset_id!r}")

    async def delete(self, document_id: str) -> Receipt:
        """Mark a document as deleted; its handler removes the postings, then the rest.

        Errors: LookupError, also when it is long gone.
        """
        while True:
            present = await self.get(document_id)
            if present is None:
                raise LookupError(f"there is no document {document_id!r}")
            async with self.bus.transaction() as change:
                if present.status is not Status.DELETED:
                    delete_document(change, present)
                else:  # by an earlier call
                    again = DocumentDeleted(document_id=document_id, dataset_id=present.dataset_id)
                    change.publish(again, when=unchanged(change, present))
            if change.receipts:
                return change.receipts[0]


class MessageService:
    """Messages: what people write to an app."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def create(self, message_id: str, user_id: str, app_id: str, text: str) -> Receipt:
        """Store a message and tell how many tokens it is, estimated from its length.

        Called again it is told again, and charged once (quota.py).
        Errors: ValueError for a bad id, a text too long, or an id that another message has.
        """
        key = message_key(checked_id(message_id, "message id"))
        checked_id(user_id, "user id")
        if len(text) > MAX_MESSAGE_CHARS:
            raise ValueError(f"a message has at most {MAX_MESSAGE_CHARS:,} characters")
        fields = {"user_id": user_id, "app_id": app_id, "text": text}
        async with self.bus.transaction() as change:
            for field, value in fields.items():
                change.hsetnx(key, field, value)
            tests = [change.hget(key, field).equals(value) for field, value in fields.items()]
            change.publish(
                MessageCreated(
                    message_id=message_id,
                    user_id=user_id,
                    app_id=app_id,
                    tokens=1 + len(text) // CHARS_PER_TOKEN,
                ),
                when=tests[0] & tests[1] & tests[2],
            )
        if not change.receipts:
            raise ValueError(f"there is another message {message_id!r}")
        return change.receipts[0]


class QuotaService:
    """Quotas: how many tokens a user's messages may come to; quota.py takes them off."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def grant(self, user_id: str, tokens: int) -> Receipt:
        """Let a user use `tokens` in all, counting what was used before: raise it to go on.

        May lower it, too; when that takes the balance below zero, `quota.exceeded` is told.
        Errors: ValueError for a bad id or a negative number.
        """
        key = quota_key(checked_id(user_id, "user id"))
        if tokens < 0:
            raise ValueError(f"a quota is 0 tokens or more, not {tokens}")
        while True:
            granted = await self.bus.redis.hget(key, "granted")
            more = tokens - int(granted or 0)
            async with self.bus.transaction() as change:
                seen = change.hget(key, "granted")
                same = seen.missing() if granted is None else seen.equals(granted)
                change.hset(key, {"granted": tokens}, when=same)
                left = change.hincrby(key, "balance", more, when=same)
                change.publish(QuotaGranted(user_id=user_id, tokens=tokens), when=same)
                change.publish(QuotaExceeded(user_id=user_id), when=left.between(more, -1))
            if change.receipts:
                return change.receipts[0]

    async def balance(self, user_id: str) -> int:
        """Return how many tokens a user has left: below zero when more were used than granted."""
        return int(await self.bus.redis.hget(quota_key(user_id), "balance") or 0)


def _title_and_status(title: str) -> Fields:
    if len(title) > MAX_TITLE_CHARS:
        raise ValueError(f"a title has at most {MAX_TITLE_CHARS} characters, not {len(title)}")
    return {
        "title": title,
        "revision": new_revision(),
        "status": Status.NEW,
        "error": "",
        "words": 0,
    }


def _text(text: bytes | None) -> Fields:
    if text is not None and len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"a text has at most {MAX_TEXT_BYTES:,} bytes, not {len(text):,}")
    return {"has_text": int(text is not None), "text": text or b""}
