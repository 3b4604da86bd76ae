# ruff: noqa: D101 - the name of an event says what happened; a docstring, what the name does not
"""Everything that can happen in the application, and the topics it is kept in.

An event says that something happened and to what: ids, names, sizes. A document's text is not in
it; that lies in the document's hash, where one finds it as it is now.

The key decides which events keep company in one partition. Whatever concerns one document has the
document's key, and a quota has the key of the user whose messages use it up, so that a cause and
what follows from it lie in one stream. To add an event, write its class here; to add a field to
one that exists, give the field a default, and old entries stay readable. Where fields go or change
their meaning, raise the version and keep the old class as long as old entries are kept.

The streaming families `model.*` and `agent.*` have a factory each: short to call in a loop, and
the place where what models and tools produce is cut to a size that an event may have.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

from bus import Event, Topic

# Four streams let four workers share the busiest topic, and one of them still reads all of it.
# The first process that uses a topic fixes the number. The other topics have one partition.
DOCUMENTS = Topic("document", partitions=4)

EXCERPT_CHARS = 4_000  # what an event holds of a tool's arguments, a result or an error


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


# --- what a model streams while it answers


class ModelMessageStart(Event, type="model.message_start", key="run_id"):
    run_id: str
    message_id: str
    model: str


class ModelContentBlockStart(Event, type="model.content_block_start", key="run_id"):
    run_id: str
    index: int
    kind: str


class ModelContentBlockDelta(Event, type="model.content_block_delta", key="run_id"):
    run_id: str
    index: int
    text: str


class ModelContentBlockStop(Event, type="model.content_block_stop", key="run_id"):
    run_id: str
    index: int


class ModelMetadata(Event, type="model.metadata", key="run_id"):
    run_id: str
    input_tokens: int
    output_tokens: int
    duration_ms: int


class ModelMessageStop(Event, type="model.message_stop", key="run_id"):
    run_id: str
    stop_reason: str


def model_message_start(run_id: str, message_id: str, model: str) -> ModelMessageStart:
    """Say that a model begins to answer. Everything of one run lies in one partition."""
    return ModelMessageStart(run_id=run_id, message_id=message_id, model=model)


def model_content_block_start(
    run_id: str, index: int, kind: Literal["text", "thinking", "tool_use"] = "text"
) -> ModelContentBlockStart:
    """Say that block `index` of the answer, counted from 0, begins."""
    return ModelContentBlockStart(run_id=run_id, index=index, kind=kind)


def model_content_block_delta(run_id: str, index: int, text: str) -> ModelContentBlockDelta:
    """Say what came next in block `index`; the deltas of a block joined are its text."""
    return ModelContentBlockDelta(run_id=run_id, index=index, text=text)


def model_content_block_stop(run_id: str, index: int) -> ModelContentBlockStop:
    """Say that block `index` is complete."""
    return ModelContentBlockStop(run_id=run_id, index=index)


def model_metadata(
    run_id: str, *, input_tokens: int, output_tokens: int, duration_ms: int
) -> ModelMetadata:
    """Say what the answer took, once the provider has told."""
    return ModelMetadata(
        run_id=run_id,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        duration_ms=duration_ms,
    )


def model_message_stop(run_id: str, stop_reason: str = "end_turn") -> ModelMessageStop:
    """Say that the answer is complete, and why it ended: "end_turn", "max_tokens", "tool_use"."""
    return ModelMessageStop(run_id=run_id, stop_reason=stop_reason)


# --- what an agent streams while it works


class AgentRunStarted(Event, type="agent.run_started", key="run_id"):
    run_id: str
    app_id: str
    user_id: str


class AgentRunFinished(Event, type="agent.run_finished", key="run_id"):
    run_id: str
    outcome: str
    duration_ms: int


class AgentToolCalled(Event, type="agent.tool_called", key="run_id"):
    """`arguments`: JSON text, the beginning of it when `truncated`."""

    run_id: str
    call_id: str
    tool: str
    arguments: str
    truncated: bool = False


class AgentToolReturned(Event, type="agent.tool_returned", key="run_id"):
    """`result`: what the tool answered, the beginning of it when `truncated`."""

    run_id: str
    call_id: str
    result: str
    duration_ms: int
    truncated: bool = False


class AgentError(Event, type="agent.error", key="run_id"):
    run_id: str
    error_type: str
    message: str


def agent_run_started(run_id: str, app_id: str, user_id: str) -> AgentRunStarted:
    """Say that an agent begins a run for a user of an app."""
    return AgentRunStarted(run_id=run_id, app_id=app_id, user_id=user_id)


def agent_run_finished(
    run_id: str, duration_ms: int, outcome: Literal["done", "failed", "cancelled"] = "done"
) -> AgentRunFinished:
    """Say that the run is over; nothing follows in its stream."""
    return AgentRunFinished(run_id=run_id, outcome=outcome, duration_ms=duration_ms)


def agent_tool_called(
    run_id: str, call_id: str, tool: str, arguments: Mapping[str, Any]
) -> AgentToolCalled:
    """Say that the agent calls a tool; values that JSON does not know are shown by `str`."""
    text = json.dumps(dict(arguments), default=str, ensure_ascii=False)
    return AgentToolCalled(
        run_id=run_id,
        call_id=call_id,
        tool=tool,
        arguments=text[:EXCERPT_CHARS],
        truncated=len(text) > EXCERPT_CHARS,
    )


def agent_tool_returned(
    run_id: str, call_id: str, result: str, duration_ms: int
) -> AgentToolReturned:
    """Say what the call `call_id` brought."""
    return AgentToolReturned(
        run_id=run_id,
        call_id=call_id,
        result=result[:EXCERPT_CHARS],
        duration_ms=duration_ms,
        truncated=len(result) > EXCERPT_CHARS,
    )


def agent_error(run_id: str, error: BaseException) -> AgentError:
    """Say that something went wrong in the run, which may go on or not."""
    return AgentError(
        run_id=run_id, error_type=type(error).__name__, message=str(error)[:EXCERPT_CHARS]
    )
