"""Structured logs: what is in a line, and what never is."""

import json
import logging

import pytest

from bus.instrument import logging as bus_logging
from bus.telemetry import Telemetry

ENTRY = {
    "stream": "bus:{t:0}",
    "group": "g",
    "entry_id": "1-0",
    "event_id": "e",
    "event_type": "t.x",
    "attempt": 1,
}
FAILURE = {"error_type": "ValueError", "error": "CANARY in the text", "where": "h.py:3 handle"}


@pytest.fixture
def telemetry():
    made = Telemetry()
    bus_logging.attach(made)
    bus_logging._said.clear()
    return made


def lines(caplog, form: logging.Formatter) -> list[str]:
    return [form.format(r) for r in caplog.records]


def test_a_line_of_json_holds_the_fields_and_no_text_of_an_exception(telemetry, caplog):
    with caplog.at_level("INFO", logger="bus"):
        telemetry.emit("delivery.retried", **ENTRY, delay_s=0.5, **FAILURE)
    (line,) = lines(caplog, bus_logging.JsonLines())
    found = json.loads(line)
    assert found["event"] == "delivery.retried"
    assert found["level"] == "WARNING"
    assert (found["group"], found["attempt"], found["where"]) == ("g", 1, "h.py:3 handle")
    assert "CANARY" not in line


def test_the_text_of_an_exception_is_told_at_debug(telemetry, caplog):
    with caplog.at_level("DEBUG", logger="bus"):
        telemetry.emit("delivery.retried", **ENTRY, delay_s=0.5, **FAILURE)
    assert "CANARY" in lines(caplog, bus_logging.JsonLines())[0]


def test_why_an_entry_cannot_be_decoded_is_told_always(telemetry, caplog):
    why = {"error_type": "Undecodable", "error": "t.x: missing field `n`", "where": ""}
    with caplog.at_level("INFO", logger="bus"):
        telemetry.emit("delivery.dead_lettered", **ENTRY, reason="undecodable", **why)
    assert "missing field `n`" in lines(caplog, bus_logging.TextLines())[0]


def test_a_failure_that_goes_on_is_said_once(telemetry, caplog):
    with caplog.at_level("INFO", logger="bus"):
        for _ in range(100):
            telemetry.emit("read.failed", group="g", error_type="E", error="nobody answers")
        telemetry.emit("read.failed", group="g", error_type="E", error="something else")
        telemetry.emit("read.failed", group="h", error_type="E", error="nobody answers")
    assert len(caplog.records) == 3


def test_how_often_it_was_left_out_is_said_with_the_next(telemetry, caplog, monkeypatch):
    with caplog.at_level("INFO", logger="bus"):
        for _ in range(5):
            telemetry.emit("lease.failed", worker="w", error_type="E", error="away")
        monkeypatch.setattr(bus_logging, "SAY_AGAIN_S", 0.0)
        telemetry.emit("lease.failed", worker="w", error_type="E", error="away")
    assert [r.fields.get("repeated") for r in caplog.records] == [None, 4]


def test_a_line_of_text_is_one_line_whatever_is_in_it(telemetry, caplog):
    with caplog.at_level("INFO", logger="bus"):
        telemetry.emit(
            "consumer.forgotten", stream="s", group="g\nERROR forged", consumer="\x1b[31mred"
        )
    (line,) = lines(caplog, bus_logging.TextLines())
    assert "\n" not in line
    assert "\x1b" not in line
    assert "forged" in line
