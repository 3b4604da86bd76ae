# ruff: noqa: D101 - the name of an event says what happened; a docstring, what the name does not
"""Everything that can happen in the application, and the topics it is kept in.

An event says that something happened and to what: ids, names, sizes. A document's text is not in
it; that lies in the document's hash, where one finds it as it is now.

The key decides which events keep company in one partition. Whatever concerns one document has the
document's key, and a quota has the key of the user whose messages use it up, so that a cause and
what follows from it lie in one stream. To add an event, write its class here; to add a field to
one that exists, give the field a default, and old entries stay readable. Where fields go or change
their meaning, raise the version and keep the old class as long as old entries are kept.

What agents and models stream while they work has events of its own, with a factory each:
`bus.agents`.
"""

from bus import Event, Topic

# Four streams let four workers share the busiest topic, and one of them still reads all of it.
# The first process that uses a topic fixes the number. The other topics have one partition.
DOCUMENTS = Topic("document", partitions=4)


# --- apps and datasets


class AppCreated(Event, type="app.created", key="app_id"):
    app_id: str
    name: str


class AppUpdated(Event, type="app.updated", key="app_id"):
    app_id: str
    name: str


class AppDeleted(Event, type="app.deleted", key="app_id"):
    app_id: str


class DatasetCreated(Event, type="dataset.created", key="dataset_id"):
    dataset_id: str
    app_id: str
    name: str


class DatasetDeleted(Event, type="dataset.deleted", key="dataset_id"):
    """`app_id`: whose dataset it was; empty in older entries, and when it was gone before."""

    dataset_id: str
    app_id: str = ""


class DatasetDocumentAdded(
    Event, type="dataset.document_added", topic="document", key="document_id"
):
    """Told with the document's own `document.created`, in one step and one stream."""

    dataset_id: str
    document_id: str


# --- documents


class DocumentCreated(Event, type="document.created", key="document_id"):
    document_id: str
    dataset_id: str
    title: str


class DocumentUpdated(Event, type="document.updated", key="document_id"):
    document_id: str
    dataset_id: str
    title: str


class DocumentDeleted(Event, type="document.deleted", key="document_id"):
    document_id: str
    dataset_id: str


class DocumentIndexed(Event, type="document.indexed", key="document_id"):
    """`words`: how many different words of it can be searched for."""

    document_id: str
    dataset_id: str
    words: int


class DocumentIndexFailed(Event, type="document.index_failed", key="document_id"):
    """Indexing was given up. `error`: its kind and message, for the person who uploaded it."""

    document_id: str
    dataset_id: str
    error: str


# --- messages and quotas


class MessageCreated(Event, type="message.created", topic="message", key="user_id"):
    message_id: str
    user_id: str
    app_id: str
    tokens: int


class QuotaGranted(Event, type="quota.granted", topic="message", key="user_id"):
    """`tokens`: what the user may use in all, from now on."""

    user_id: str
    tokens: int


class QuotaExceeded(Event, type="quota.exceeded", version=2, topic="message", key="user_id"):
    """A user has used more tokens than allowed: told once, when the balance falls below zero.

    message_id, tokens: the message that did it; empty and 0 when the quota was lowered instead.
    What the user has used in all is not in it: the server counts it in the very step that appends
    this event. `QuotaService.balance` tells how it stands.
    """

    user_id: str
    message_id: str = ""
    tokens: int = 0


class QuotaExceededV1(Event, type="quota.exceeded", version=1, topic="message", key="user_id"):
    """What `quota.exceeded` was before. Nobody publishes it; old entries stay readable."""

    user_id: str
    tokens_used: int
    tokens_allowed: int
