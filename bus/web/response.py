"""A channel as Server-Sent Events: what a browser's EventSource follows, and goes on with."""

from collections.abc import AsyncGenerator
from contextlib import suppress

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, Response

from bus.channels.channel import Channel
from bus.channels.tail import ChannelTail
from bus.config import checked_number
from bus.envelope import Envelope
from bus.errors import BusClosed, ChannelGap, DeclarationError
from bus.streams.codec import MSGPACK

HEARTBEAT_S = 15.0  # proxies close what is silent for 30 or 60 s
RETRY_MS = 1_000  # browsers wait 3 to 5 s before they come back, and a run goes on meanwhile
PARAMETER = "last_event_id"


def sse(
    request: HTTPConnection,
    channel: Channel,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    retry_ms: int = RETRY_MS,
) -> Response:
    """Return the response that streams a channel, from where the client has left it to its end.

    Each entry is an event: `id` the entry id, `event` the event's type, `data` the event in JSON.
    A type without a dot, which no class has, is left out: for a page it is a `message`.
    `event: end` is the last: the client should close, else it comes back to be told so again.
    `event: gap` says that entries cannot come: `{"reason", "after", "first"}`, see `ChannelGap`;
    what is there follows, after "gone" the end.

    The client goes on behind the id in its header Last-Event-ID, which a browser sends when it
    comes back, else in the query parameter `last_event_id`; else it begins at the beginning. What
    is no id is answered with 400; one that the channel does not have, with a gap.
    heartbeat_s: a comment is sent so often, that proxies keep the connection. retry_ms: how long a
    browser waits before it comes back.
    All responses of a process share one reader. One that is not taken holds up no other: at most
    2,000 entries or 2 MiB wait for it, shared with those that wait, too; then it reads by itself.
    Errors: DeclarationError for a bad heartbeat or retry.
    """
    checked_number(heartbeat_s, "heartbeat_s", 0.01, 3600)
    checked_number(retry_ms, "retry_ms", 0, 3_600_000, whole=True)
    after = request.headers.get("last-event-id") or request.query_params.get(PARAMETER) or None
    try:
        tail = channel.tail(after)
    except DeclarationError:
        return PlainTextResponse("Last-Event-ID is not the id of an entry\n", status_code=400)
    return EventSourceResponse(
        _events(tail, retry_ms), ping=heartbeat_s, ping_message_factory=_heartbeat
    )


async def _events(tail: ChannelTail, retry_ms: int) -> AsyncGenerator[ServerSentEvent, None]:
    yield ServerSentEvent(retry=retry_ms)
    async with tail:
        while not tail.over:
            try:
                async for envelope in tail:
                    yield _event(envelope)
            except ChannelGap as gap:
                yield _gap(gap)
            except BusClosed:
                return  # the server stops: the client comes back, to another
    yield ServerSentEvent("{}", event="end", id=tail.position)


def _event(envelope: Envelope) -> ServerSentEvent:
    # Whoever writes by hand may write any type; `end` and `gap` are ours, `error` and `open` the
    # browser's own. They have no dot, and the types of classes all have one.
    named = envelope.type if "." in envelope.type else None
    return ServerSentEvent(_json(envelope), event=named, id=envelope.entry_id)


def _json(envelope: Envelope) -> str:
    """Return the data as JSON, whoever wrote it; what cannot be read, as it is."""
    data = envelope.data
    if envelope.content_type == MSGPACK.encode():
        # It may be none, hold what JSON cannot, or be nested too deep. A response that failed of
        # it would fail again each time the client comes back: nothing behind it would ever come.
        with suppress(msgspec.MsgspecError, TypeError, ValueError, RecursionError):
            data = msgspec.json.encode(msgspec.msgpack.decode(data))
    return data.decode(errors="replace")


def _gap(gap: ChannelGap) -> ServerSentEvent:
    told = {"reason": gap.reason, "after": gap.after, "first": gap.first}
    return ServerSentEvent(msgspec.json.encode(told).decode(), event="gap")


def _heartbeat() -> ServerSentEvent:
    return ServerSentEvent(comment="")
