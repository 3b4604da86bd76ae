"""Structured logs of everything the bus emits, as JSON lines or as text.

    attach(bus.telemetry)          # records to the logger "bus", fields in record.fields
    configure("json")              # a program's own stderr handler, for worker.py

The text of exceptions that handlers raised is logged at DEBUG only: its author may have put an
event into it. Type and place are always logged; the full text is in the dead letter.
"""

import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from bus.telemetry import EVENTS, Telemetry

SAY_AGAIN_S = 30.0  # a failure that goes on in the same words is said again after this long
_MOST_SAID = 1_000
_OWN_ERRORS = ("Undecodable", "UnknownEventType")  # their texts hold no values of events

logger = logging.getLogger("bus")


def attach(telemetry: Telemetry) -> None:
    """Log what `telemetry` emits, at the levels of `telemetry.EVENTS`."""
    telemetry.attach("*", _log)


def _log(name: str, fields: dict[str, Any]) -> None:
    level = EVENTS[name].level
    if not logger.isEnabledFor(level):
        return
    ours = fields.get("error_type") in _OWN_ERRORS
    if "where" in fields and not ours and not logger.isEnabledFor(logging.DEBUG):
        fields = {k: v for k, v in fields.items() if k != "error"}
    repeated = _repeated(name, fields)
    if repeated is None:
        return
    if repeated:
        fields = {**fields, "repeated": repeated}
    logger.log(level, name, extra={"fields": fields})


_said: dict[tuple[str, str, str], tuple[float, int]] = {}


def _repeated(name: str, fields: dict[str, Any]) -> int | None:
    """Return how often a failure was left out since it was last said; None to leave it out now.

    While a server is away every part fails again and again, with the same words.
    """
    if not name.endswith(".failed") or name in ("worker.failed", "on_dead.failed"):
        return 0
    key = (name, str(fields.get("group")), str(fields.get("error")))
    said_at, left_out = _said.get(key, (float("-inf"), 0))
    now = time.monotonic()
    if now - said_at < SAY_AGAIN_S:
        _said[key] = (said_at, left_out + 1)
        return None
    if len(_said) >= _MOST_SAID:
        _said.clear()
    _said[key] = (now, 0)
    return left_out


def configure(form: Literal["json", "text"], level: int = logging.INFO) -> None:
    """Send the records of this program to stderr, in one of the two forms."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the structured fields: ours, or what a handler's `delivery.logger` carries."""
    own = getattr(record, "fields", None)
    if isinstance(own, dict):
        return own
    names = ("group", "stream", "entry_id", "event_id", "attempt")
    return {n: getattr(record, n) for n in names if hasattr(record, n)}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class TextLines(logging.Formatter):
    """`time LEVEL event key=value ...`; control characters are escaped, so a line is a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        pairs = [f"{k}={_shown(v)}" for k, v in _fields_of(record).items()]
        head = f"{time} {record.levelname:7} {_escaped(record.getMessage())}"
        text = " ".join([head, *pairs])
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _shown(value: Any) -> str:
    if isinstance(value, float):
        value = round(value, 3)
    elif isinstance(value, list):
        value = ",".join(map(str, value))
    text = _escaped(str(value))
    return f'"{text}"' if " " in text or not text else text


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
