"""What a program calls: each method changes the state in Redis, then publishes what happened.

In this order, because an event that arrives before its state sends handlers to look for what is
not there yet. The price: a crash between the two leaves the new state and nobody told of it. The
caller, who got no receipt, calls again with the same id, and every method may be called twice. A
caller that is gone as well leaves a document with status `new`. `bus.transaction()` of a later
release makes one step of the two.

Callers choose the ids. Every method returns the receipt of what it published.
"""

from bus import Bus, Receipt
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
)
from handlers.state import (
    Document,
    Status,
    app_key,
    change_document,
    checked_id,
    dataset_documents_key,
    dataset_key,
    message_key,
    new_revision,
    read_document,
    update_existing,
)

MAX_TEXT_BYTES = 4 * 1024 * 1024  # a handler counts its words in one go, holding up its worker
MAX_TITLE_CHARS = 500  # the title travels in events
CHARS_PER_TOKEN = 4  # what most tokenizers come to in English; an estimate is all we need


class AppService:
    """Apps: what users build and talk to."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def create(self, app_id: str, name: str) -> Receipt:
        """Create an app, or give the one with this id its first name again."""
        await self.bus.redis.hset(app_key(checked_id(app_id, "app id")), mapping={"name": name})
        return await self.bus.publish(AppCreated(app_id=app_id, name=name))

    async def update(self, app_id: str, name: str) -> Receipt:
        """Rename an app. Errors: LookupError."""
        if not await update_existing(self.bus.redis, app_key(app_id), {"name": name}):
            raise LookupError(f"there is no app {app_id!r}")
        return await self.bus.publish(AppUpdated(app_id=app_id, name=name))

    async def delete(self, app_id: str) -> Receipt:
        """Delete an app; one that is gone too, as an earlier call may have been cut off."""
        await self.bus.redis.delete(app_key(app_id))
        return await self.bus.publish(AppDeleted(app_id=app_id))


class DatasetService:
    """Datasets: what an app answers from."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def create(self, dataset_id: str, app_id: str, name: str) -> Receipt:
        """Create an empty dataset of an app."""
        key = dataset_key(checked_id(dataset_id, "dataset id"))
        await self.bus.redis.hset(key, mapping={"app_id": app_id, "name": name})
        return await self.bus.publish(
            DatasetCreated(dataset_id=dataset_id, app_id=app_id, name=name)
        )

    async def delete(self, dataset_id: str) -> Receipt:
        """Delete a dataset; its documents stay until a later release cleans up behind it."""
        await self.bus.redis.delete(dataset_key(dataset_id))
        return await self.bus.publish(DatasetDeleted(dataset_id=dataset_id))


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
        """Create a document, or write the one with this id anew; two events, in one piece.

        text: UTF-8. None announces a document whose text comes later, with `update`; until then
        indexing it fails and is tried again.
        Errors: ValueError for a bad id, a text or title too long, another dataset's document.
        """
        checked_id(dataset_id, "dataset id")
        checked_id(document_id, "document id")
        # Before the document: an id without a document in this set does no harm.
        await self.bus.redis.sadd(dataset_documents_key(dataset_id), document_id)
        while True:
            present = await self.get(document_id)
            if present is not None and present.dataset_id != dataset_id:
                raise ValueError(f"document {document_id!r} belongs to {present.dataset_id!r}")
            fields = {"dataset_id": dataset_id, **_title_and_status(title), **_text(text)}
            seen = "" if present is None else present.revision
            if await change_document(self.bus.redis, document_id, seen, fields):
                break
        return await self.bus.publish_many(
            [
                DocumentCreated(document_id=document_id, dataset_id=dataset_id, title=title),
                DatasetDocumentAdded(dataset_id=dataset_id, document_id=document_id),
            ]
        )

    async def update(
        self, document_id: str, *, title: str | None = None, text: bytes | None = None
    ) -> Receipt:
        """Change title, text or both; what is None stays. Errors: LookupError, ValueError."""
        while True:
            present = await self.get(document_id)
            if present is None or present.status is Status.DELETED:
                raise LookupError(f"there is no document {document_id!r}")
            new_title = present.title if title is None else title
            fields = _title_and_status(new_title) | ({} if text is None else _text(text))
            if await change_document(self.bus.redis, document_id, present.revision, fields):
                break
        return await self.bus.publish(
            DocumentUpdated(document_id=document_id, dataset_id=present.dataset_id, title=new_title)
        )

    async def delete(self, document_id: str) -> Receipt:
        """Mark a document as deleted; its handler removes the postings, then the rest.

        Errors: LookupError, also when it is long gone.
        """
        while True:
            present = await self.get(document_id)
            if present is None:
                raise LookupError(f"there is no document {document_id!r}")
            fields = _title_and_status(present.title) | {"status": Status.DELETED} | _text(None)
            if await change_document(self.bus.redis, document_id, present.revision, fields):
                break
        return await self.bus.publish(
            DocumentDeleted(document_id=document_id, dataset_id=present.dataset_id)
        )


class MessageService:
    """Messages: what people write to an app."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def create(self, message_id: str, user_id: str, app_id: str, text: str) -> Receipt:
        """Store a message and tell how many tokens it is, estimated from its length."""
        key = message_key(checked_id(message_id, "message id"))
        await self.bus.redis.hset(key, mapping={"user_id": user_id, "app_id": app_id, "text": text})
        return await self.bus.publish(
            MessageCreated(
                message_id=message_id,
                user_id=user_id,
                app_id=app_id,
                tokens=1 + len(text) // CHARS_PER_TOKEN,
            )
        )


def _title_and_status(title: str) -> dict[str, str | bytes | int]:
    if len(title) > MAX_TITLE_CHARS:
        raise ValueError(f"a title has at most {MAX_TITLE_CHARS} characters, not {len(title)}")
    return {
        "title": title,
        "revision": new_revision(),
        "status": Status.NEW,
        "error": "",
        "words": 0,
    }


def _text(text: bytes | None) -> dict[str, str | bytes | int]:
    if text is not None and len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"a text has at most {MAX_TEXT_BYTES:,} bytes, not {len(text):,}")
    return {"has_text": int(text is not None), "text": text or b""}
