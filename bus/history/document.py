"""An event with its envelope as plain values: what a JSON document can say of it."""

import base64
from typing import Any

import msgspec

from bus.config import MAX_DECODE_BYTES
from bus.envelope import Envelope
from bus.streams.codec import JSON, MSGPACK


def document_of(envelope: Envelope) -> dict[str, Any]:
    """Return what an envelope says, as plain values for a JSON document.

    data: the event, if JSON can say all of it; else it is in `data_base64`.
    """
    content_type = (envelope.content_type or JSON.encode()).decode(errors="replace")
    said = {
        "event_id": envelope.event_id,
        "type": envelope.type,
        "version": envelope.version,
        "key": envelope.key,
        "time": envelope.time.isoformat(),
        "source": envelope.source,
        "correlation_id": envelope.correlation_id,
        "causation_id": envelope.causation_id,
        "causation_depth": envelope.causation_depth,
        "traceparent": envelope.traceparent,
        "tracestate": envelope.tracestate,
        "content_type": content_type,
    }
    value = json_value(decoded(envelope.data, packed=content_type == MSGPACK))
    if value is msgspec.UNSET:
        said["data_base64"] = in_base64(envelope.data)
    else:
        said["data"] = value
    return said


def decoded(data: bytes, *, packed: bool) -> Any:
    """Return what encoded data says, UNSET if it is neither JSON nor, if `packed`, msgpack."""
    if len(data) > MAX_DECODE_BYTES:
        return msgspec.UNSET
    try:
        return (msgspec.msgpack if packed else msgspec.json).decode(data)
    except Exception:  # RecursionError and UnicodeDecodeError are no errors of msgspec's
        return msgspec.UNSET


def json_value(value: Any) -> Any:
    """Return `value` if it is the same when it has been JSON, else UNSET.

    Bytes, times and NaN, which msgpack may hold, would come out of it as something else.
    """
    try:
        same = msgspec.json.decode(msgspec.json.encode(value)) == value
    except (msgspec.MsgspecError, TypeError, RecursionError):  # there are keys that it cannot say
        return msgspec.UNSET
    return value if same else msgspec.UNSET


def in_base64(part: bytes) -> str:
    """Return bytes as text."""
    return base64.b64encode(part).decode()
