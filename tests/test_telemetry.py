"""Everything emitted is in one table, with exactly its fields; listeners cannot do harm."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest

from bus import Backoff, Bus, DeclarationError, Event, Reject, Worker, event_handler
from bus.telemetry import EVENTS, Telemetry

PACKAGE = Path(__file__).parent.parent / "bus"
# What is spread into a call (`**names`) or added by a helper of the settler.
SPREAD = ("stream", "group", "entry_id", "event_id", "event_type", "attempt")
WRAPPED = ("stream", "group")


def calls() -> list[tuple[str, str, set[str]]]:
    """Return (place, name, fields) of every emit with a literal name in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr not in ("emit", "_emit"):
                continue
            place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            fields: set[str] = set(WRAPPED) if node.func.attr == "_emit" else set()
            for keyword in node.keywords:
                fields |= {keyword.arg} if keyword.arg else set(SPREAD)
            name = node.args[0]
            if isinstance(name, ast.Constant):
                found.append((place, name.value, fields))
            else:
                assert isinstance(name, ast.Name), f"{place} emits a name that is computed"
    return found


@pytest.mark.parametrize(
    ("place", "name", "fields"), [pytest.param(*c, id=f"{c[0]} {c[1]}") for c in calls()]
)
def test_what_the_code_emits_is_in_the_table(place, name, fields):
    assert fields == set(EVENTS[name].fields)


def test_everything_in_the_table_is_emitted_somewhere():
    assert {name for _, name, _ in calls()} == set(EVENTS)


def test_every_row_has_a_level_and_a_meaning():
    for name, row in EVENTS.items():
        assert row.level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR), name
        assert row.meaning, name
        assert len(set(row.fields)) == len(row.fields), name


class Rung(Event, type="telemetrybell.rung"):
    how: str


@event_handler(Rung, group="bell", backoff=Backoff(0.01), max_attempts=2, breaker=None)
async def answer(event: Rung) -> None:
    if event.how == "badly":
        raise ValueError("too loud")
    if event.how == "never":
        raise Reject("silence")


async def test_what_is_emitted_at_work_has_the_fields_of_the_table(valkey_url):
    seen: dict[str, list[dict]] = {}
    async with Bus.connect(valkey_url) as bus:
        bus.telemetry.attach("*", lambda name, fields: seen.setdefault(name, []).append(fields))
        async with Worker(bus, [answer]) as worker:
            await bus.publish_many([Rung(how=h) for h in ("well", "badly", "never")])
            await worker.drained(20)
    wrong = {
        name: sorted(fields)
        for name, found in seen.items()
        for fields in found
        if set(fields) != set(EVENTS[name].fields)
    }
    assert wrong == {}
    assert {"publish.appended", "read.received", "delivery.acked", "delivery.retried"} <= set(seen)
    assert {"delivery.dead_lettered", "worker.started", "worker.stopped"} <= set(seen)
    assert {f["reason"] for f in seen["delivery.dead_lettered"]} == {"failed", "rejected"}
    assert "well" not in str(seen)  # no payload


def test_a_listener_hears_what_its_pattern_names():
    telemetry, heard = Telemetry(), []
    telemetry.attach("delivery.*", lambda name, fields: heard.append((name, fields)))
    telemetry.attach("delivery.acked", lambda name, fields: heard.append("one name"))
    telemetry.emit("delivery.acked", count=1)
    telemetry.emit("publish.failed", count=1)
    assert heard == [("delivery.acked", {"count": 1}), "one name"]


@pytest.mark.parametrize("pattern", ["", "no.such", "delivery", "deliver.*", "delivery.ack*", ".*"])
def test_a_pattern_that_names_nothing_is_refused(pattern):
    with pytest.raises(DeclarationError, match="nothing named"):
        Telemetry().attach(pattern, print)


def test_a_detached_listener_hears_nothing_more():
    telemetry, heard = Telemetry(), []
    telemetry.attach("*", heard.extend)  # a bound method, new at each look
    telemetry.detach(heard.extend)
    telemetry.detach(print)
    telemetry.emit("worker.started")
    assert heard == []


def test_a_listener_may_detach_itself_while_it_is_told():
    telemetry, heard = Telemetry(), []

    def once(name, fields):
        telemetry.detach(once)
        heard.append(name)

    telemetry.attach("*", once)
    telemetry.attach("*", lambda name, fields: heard.append("the other"))
    telemetry.emit("worker.started")
    telemetry.emit("worker.started")
    assert heard == ["worker.started", "the other", "the other"]


async def test_a_listener_that_raises_changes_nothing(valkey_url, caplog):
    heard = []

    def broken(name, fields):
        raise RuntimeError("listener fell over")

    async with Bus.connect(valkey_url) as bus:
        bus.telemetry.attach("*", broken)
        bus.telemetry.attach("*", lambda name, fields: heard.append(name))
        receipt = await bus.publish(Rung(how="well"))
    assert receipt.entry_id
    assert "publish.appended" in heard
    (record, *_) = [r for r in caplog.records if r.name == "bus.telemetry"]
    assert "listener for" in record.getMessage()
    assert record.exc_info


def test_what_fails_is_never_silent_even_when_nobody_listens(caplog):
    telemetry = Telemetry()
    with caplog.at_level("DEBUG", logger="bus"):
        telemetry.emit("delivery.acked", stream="s", group="g", count=1)
        telemetry.emit("on_dead.failed", group="g", error_type="E", error="SECRET", where="f.py:1")
    assert [r.getMessage() for r in caplog.records] == [
        "on_dead.failed group=g error_type=E where=f.py:1"
    ]
