"""What was in a deleted app or dataset goes with it.

    app.deleted      -> the app's datasets are deleted, each with its `dataset.deleted`
    dataset.deleted  -> the dataset's documents are deleted, each with its `document.deleted`

The rest is done by those who do it for every deleted document or dataset: the group "unindex"
removes the postings and then the document, the group "cache" the views. Messages stay: they belong
to their users.

May be killed at any moment, and continued by anybody. The state says what is left: the set of an
app's datasets, and that of a dataset's documents, which outlive the hash of the app or dataset.
One step deletes some of what is in the set, takes it out of the set and tells of it. So nothing is
told twice, or left out, and what happens meanwhile does no harm:

* Nothing new comes in: a dataset is created only in a step that finds its app, a document only in
  one that finds its dataset.
* A document that changes between the look and the step keeps its place in the set, for the next
  step. One that somebody else deletes leaves the set, and is told by whoever deleted it.
* An app or dataset of the same id cannot be created while anything is in the set. If it was created
  after that, as may be found by an event that comes late or again, no step does anything.
"""

from collections.abc import Sequence

from bus import Bus, Condition, Delivery, Effects, Event, Reply, event_handler
from handlers.events import AppDeleted, DatasetDeleted, DocumentDeleted
from handlers.state import (
    Document,
    Fields,
    Redis,
    Status,
    app_datasets_key,
    app_key,
    dataset_documents_key,
    dataset_key,
    document_key,
    new_revision,
    read_documents,
    unchanged,
)

PER_STEP = 100  # documents or datasets: about a millisecond of server, and others get their turn


@event_handler(AppDeleted, DatasetDeleted, group="cleanup")
async def clean_up(event: AppDeleted | DatasetDeleted, delivery: Delivery[Event]) -> None:
    """Delete what was in a deleted app or dataset."""
    bus = delivery.bus
    if isinstance(event, AppDeleted):
        while dataset_ids := await _some(bus.redis, app_datasets_key(event.app_id)):
            if not await _delete_datasets(bus, event.app_id, dataset_ids):
                return
    else:
        while document_ids := await _some(bus.redis, dataset_documents_key(event.dataset_id)):
            if not await _delete_documents(bus, event.dataset_id, document_ids):
                return


async def _some(redis: Redis, key: str) -> list[str]:
    return [i.decode() for i in await redis.srandmember(key, PER_STEP)]


async def _delete_datasets(bus: Bus, app_id: str, dataset_ids: Sequence[str]) -> bool:
    """Delete datasets of a deleted app; False if there is such an app."""
    async with bus.transaction() as change:
        app = change.exists(app_key(app_id))
        for dataset_id in dataset_ids:
            delete_dataset(change, dataset_id, app_id, app.equals(0))
        # Also what is none of its datasets, whoever put it there: what stays would come for ever.
        change.srem(app_datasets_key(app_id), *dataset_ids, when=app.equals(0))
    return bool(app.value == 0)


async def _delete_documents(bus: Bus, dataset_id: str, document_ids: Sequence[str]) -> bool:
    """Delete documents of a deleted dataset; False if there is such a dataset."""
    documents = await read_documents(bus.redis, document_ids)
    async with bus.transaction() as change:
        dataset = change.exists(dataset_key(dataset_id))
        for document_id, document in zip(document_ids, documents, strict=True):
            if document is not None and document.status is not Status.DELETED:
                delete_document(change, document, dataset.equals(0))
                continue
            # Somebody else has just deleted it, and taken it out of the set. If it was removed by
            # hand it is still there, and would come for ever.
            absent = (
                change.exists(document_key(document_id)).equals(0)
                if document is None
                else unchanged(change, document)
            )
            documents_key = dataset_documents_key(dataset_id)
            change.srem(documents_key, document_id, when=absent & dataset.equals(0))
    return bool(dataset.value == 0)


def delete_dataset(
    effects: Effects, dataset_id: str, app_id: str, when: Condition | None = None
) -> Reply:
    """Delete a dataset of an app, if it still is one; return the reply of its event."""
    ours = effects.hget(dataset_key(dataset_id), "app_id").equals(app_id)
    ours = ours if when is None else ours & when
    effects.delete(dataset_key(dataset_id), when=ours)
    effects.srem(app_datasets_key(app_id), dataset_id, when=ours)
    return effects.publish(DatasetDeleted(dataset_id=dataset_id, app_id=app_id), when=ours)


def delete_document(effects: Effects, document: Document, when: Condition | None = None) -> Reply:
    """Mark a document as deleted, if it has not changed; return the reply of its event.

    Its hash goes when its postings are gone: see `indexing.unindex_document`.
    """
    same = unchanged(effects, document)
    same = same if when is None else same & when
    gone: Fields = {
        "revision": new_revision(),
        "status": Status.DELETED,
        "error": "",
        "words": 0,
        "has_text": 0,
        "text": "",
    }
    effects.hset(document_key(document.document_id), gone, when=same)
    effects.srem(dataset_documents_key(document.dataset_id), document.document_id, when=same)
    return effects.publish(
        DocumentDeleted(document_id=document.document_id, dataset_id=document.dataset_id),
        when=same,
    )
