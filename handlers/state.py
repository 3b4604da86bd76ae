"""Where the application keeps its state in Redis: every key, and what a document is.

    kb:app:<id>                     hash: name
    kb:app:<id>:datasets            set of the ids of its datasets
    kb:dataset:<id>                 hash: app_id, name
    kb:dataset:<id>:documents       set of the ids of its documents, without deleted ones
    kb:{<dataset>}:word:<word>      sorted set: document id -> weight; the postings of a word
    kb:document:<id>                hash: dataset_id, title, revision, status, error, words,
                                          has_text, text
    kb:document:<id>:words          set of the words under which a posting lies
    kb:message:<id>                 hash: user_id, app_id, text, charged
    kb:quota:<user>                 hash: granted, balance
    kb:views:<kind>:<id>            hash: view -> JSON, of an app or dataset; expires
    kb:generation:<kind>:<id>       string that changes whenever the views go; expires

The postings of a dataset share a hash tag, because `search` unites them in one command.

The set of what is in an app or dataset outlives its hash: what is still in it then is what the
cleanup has yet to delete, and no app or dataset of that id can be created before it is empty.

A document changes under the feet of whoever works on it: two workers, a retry of yesterday's
event, a user who deletes it. So its hash has a `revision`, which changes with the contents. What
belongs to a revision (status, postings) is written only in a step that finds it `unchanged`.
"""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from bus import Condition, Effects

# `redis` is a redis.asyncio.Redis that answers bytes, as `bus.redis` does. It is typed Any
# because the application imports from `bus` only.
Redis: TypeAlias = Any
Fields: TypeAlias = Mapping[str, str | bytes | int]

_FIELDS = ("dataset_id", "title", "revision", "status", "error", "words", "has_text")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Status(StrEnum):
    """How far a document has come.

    new: stored, or changed since it was indexed. deleted: its postings are about to go, then the
    hash itself goes.
    """

    NEW = "new"
    INDEXING = "indexing"
    INDEXED = "indexed"
    INDEX_FAILED = "index_failed"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it is now, without its text.

    revision: changes with title, text and deletion, not with the status.
    error: why indexing was given up; empty unless the status is index_failed.
    words: how many different words are indexed; 0 until they are.
    has_text: whether the text has come; a document may be announced before.
    """

    document_id: str
    dataset_id: str
    title: str
    revision: str
    status: Status
    error: str = ""
    words: int = 0
    has_text: bool = False


def checked_id(value: str, what: str) -> str:
    """Return `value` if it may stand in a key. Errors: ValueError."""
    if not _ID.fullmatch(value):
        raise ValueError(
            f"{what} {value!r}: 1 to 100 letters, digits, '.', '_' or '-',"
            " starting with a letter or digit"
        )
    return value


def app_key(app_id: str) -> str:
    """Return the key of an app's hash."""
    return f"kb:app:{app_id}"


def app_datasets_key(app_id: str) -> str:
    """Return the key of the set of an app's datasets."""
    return f"kb:app:{app_id}:datasets"


def dataset_key(dataset_id: str) -> str:
    """Return the key of a dataset's hash."""
    return f"kb:dataset:{dataset_id}"


def dataset_documents_key(dataset_id: str) -> str:
    """Return the key of the set of a dataset's documents."""
    return f"kb:dataset:{dataset_id}:documents"


def postings_key(dataset_id: str, word: str) -> str:
    """Return the key of the postings of one word in one dataset."""
    return f"kb:{{{dataset_id}}}:word:{word}"


def document_key(document_id: str) -> str:
    """Return the key of a document's hash."""
    return f"kb:document:{document_id}"


def document_words_key(document_id: str) -> str:
    """Return the key of the set of words under which a document may be found."""
    return f"kb:document:{document_id}:words"


def message_key(message_id: str) -> str:
    """Return the key of a message's hash."""
    return f"kb:message:{message_id}"


def quota_key(user_id: str) -> str:
    """Return the key of a user's quota."""
    return f"kb:quota:{user_id}"


def new_revision() -> str:
    """Return a revision unlike any other; only being equal or not has a meaning."""
    return secrets.token_hex(6)


async def read_document(redis: Redis, document_id: str) -> Document | None:
    """Return the document as it is now, None if there is none; a deleted one says so."""
    return _document(document_id, await redis.hmget(document_key(document_id), _FIELDS))


async def read_documents(redis: Redis, document_ids: Sequence[str]) -> list[Document | None]:
    """Return documents in the order of their ids, None for each that is not there."""
    pipeline = redis.pipeline(transaction=False)
    for document_id in document_ids:
        pipeline.hmget(document_key(document_id), _FIELDS)
    rows = await pipeline.execute()
    return [_document(i, row) for i, row in zip(document_ids, rows, strict=True)]


def _document(document_id: str, values: Iterable[bytes | None]) -> Document | None:
    texts = [value.decode() for value in values if value is not None]
    if len(texts) < len(_FIELDS):
        return None
    dataset_id, title, revision, status, error, words, has_text = texts
    return Document(
        document_id=document_id,
        dataset_id=dataset_id,
        title=title,
        revision=revision,
        status=Status(status),
        error=error,
        words=int(words),
        has_text=has_text == "1",
    )


def unchanged(effects: Effects, document: Document) -> Condition:
    """Return the condition that a document still has the revision seen."""
    seen = effects.hget(document_key(document.document_id), "revision")
    return seen.equals(document.revision)
