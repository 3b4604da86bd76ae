"""Where the application keeps its state in Redis: every key, and the one guarded write.

    kb:app:<id>                     hash: name
    kb:dataset:<id>                 hash: app_id, name
    kb:dataset:<id>:documents       set of document ids
    kb:{<dataset>}:word:<word>      sorted set: document id -> weight; the postings of a word
    kb:document:<id>                hash: dataset_id, title, revision, status, error, words,
                                          has_text, text
    kb:document:<id>:words          set of the words under which a posting may lie
    kb:message:<id>                 hash: user_id, app_id, text

The postings of a dataset share a hash tag, because `search` unites them in one command.

A document changes under the feet of whoever works on it: two workers, a retry of yesterday's
event, a user who deletes it. So its hash has a `revision`, which changes with the contents, and
is written by `change_document` alone, which does nothing if the revision is not the one seen.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

# `redis` is a redis.asyncio.Redis that answers bytes, as `bus.redis` does. It is typed Any
# because the application imports from `bus` only.
Redis: TypeAlias = Any
Fields: TypeAlias = Mapping[str, str | bytes | int]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

# KEYS: a hash. ARGV: field, value, ...
# Redis has no HSET for existing keys only, and one that comes after a delete leaves a stump.
_UPDATE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV))
return 1
"""
# KEYS: the document's hash. ARGV: the revision seen ('' for none), field, value, ...
_CHANGE = """
if (redis.call('HGET', KEYS[1], 'revision') or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
return 1
"""
# KEYS, ARGV: as above, without fields.
_FORGET = """
if redis.call('HGET', KEYS[1], 'revision') ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


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


def new_revision() -> str:
    """Return a revision unlike any other; only being equal or not has a meaning."""
    return secrets.token_hex(6)


async def update_existing(redis: Redis, key: str, fields: Fields) -> bool:
    """Set fields of a hash that exists; return whether it does."""
    flat = [part for pair in fields.items() for part in pair]
    return bool(await redis.eval(_UPDATE, 1, key, *flat))


async def read_document(redis: Redis, document_id: str) -> Document | None:
    """Return the document as it is now, None if there is none; a deleted one says so."""
    names = ("dataset_id", "title", "revision", "status", "error", "words", "has_text")
    values = await redis.hmget(document_key(document_id), names)
    if values[2] is None:
        return None
    dataset_id, title, revision, status, error, words, has_text = map(bytes.decode, values)
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


async def change_document(
    redis: Redis, document_id: str, seen_revision: str, fields: Fields
) -> bool:
    """Set fields of a document unless it has changed since; return whether they were set.

    seen_revision: as read; "" when there was no document. The first change sets every field.
    """
    flat = [part for pair in fields.items() for part in pair]
    key = document_key(document_id)
    return bool(await redis.eval(_CHANGE, 1, key, seen_revision, *flat))


async def forget_document(redis: Redis, document_id: str, seen_revision: str) -> bool:
    """Remove a document's hash unless it has changed since; return whether it was removed."""
    return bool(await redis.eval(_FORGET, 1, document_key(document_id), seen_revision))
