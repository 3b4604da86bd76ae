"""Effects of a delivery take place with its ack, once, or not at all, whatever comes between."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Breaker, Delivery, Event, Topic, Worker, event_handler
from bus.streams import stream as verbs
from tests.faults.proxy import Proxy, digest
from tests.guarantees.backend import Backend
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus import Bus, DeadLettered, Handler
    from tests.conftest import PrivateServer

STREAM, GROUP = "bus:{ledger:0}", "books"
INBOX, DEAD = f"{STREAM}:inbox:{GROUP}", f"{STREAM}:dead:{GROUP}"
SOON = Backoff(base_s=0.02, factor=1.0, jitter=0.0)


class Paid(Event, type="ledger.paid"):
    """kind: what is wrong with the effects, see `books`."""

    n: int
    kind: str = "good"


class Booked(Event, type="booking.booked", key="key"):
    key: str
    n: int = 0


class Books:
    """The handler most tests share, and what it went through."""

    def __init__(self, **settings: Any) -> None:
        self.runs: list[tuple[int, int]] = []
        self.dead: list[tuple[int, str]] = []
        self.running = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        settings = {"concurrency": 100, "backoff": SOON, "breaker": None, **settings}
        self.handler: Handler[...] = event_handler(
            Paid, group=GROUP, on_dead=self._on_dead, **settings
        )(self._handle)

    async def _on_dead(self, dead: DeadLettered, bus: Any) -> None:
        self.dead.append((dead.event.n, dead.reason))  # type: ignore[attr-defined]

    async def _handle(self, event: Paid, delivery: Delivery[Paid]) -> None:
        self.runs.append((event.n, delivery.attempt))
        effects = delivery.effects
        effects.incrby("sum", event.n)
        effects.hincrby("times", str(event.n))
        match event.kind:
            case "mistyped":
                effects.sadd("times", "a")
            case "mistyped outside":
                effects.get("a set")
            case "text":
                effects.hincrby("texts", "text")
                effects.incrby("never")
            case "overflow":
                effects.incrby("full", 1)
        self.running.set()
        await self.go_on.wait()
        if event.kind == "flaky" and delivery.attempt < 3:
            raise ValueError("not yet")

    async def applied(self, backend: Backend) -> dict[int, int]:
        """How often the effects of each event were applied."""
        times = await backend.redis.hgetall("times")
        found = {int(n): int(count) for n, count in times.items()}
        total = int(await backend.redis.get("sum") or 0)
        assert total == sum(n * count for n, count in found.items()), "torn apart"
        return found


@asynccontextmanager
async def at_work(
    backend: Backend, books: Books, **settings: Any
) -> AsyncIterator[tuple[Bus, Witness, Worker]]:
    await backend.redis.hset("texts", "text", "many")
    await backend.redis.sadd("a set", "a")
    await backend.redis.set("full", 2**63 - 1)
    async with (
        backend.bus(**settings) as (bus, witness),
        Worker(bus, [books.handler]) as worker,
    ):
        yield bus, witness, worker


def once(*numbers: int) -> dict[int, int]:
    return dict.fromkeys(numbers, 1)


# --- once


async def test_effects_and_acks_are_one_step(backend: Backend) -> None:
    books = Books()
    async with at_work(backend, books) as (bus, witness, worker):
        await bus.publish_many([Paid(n=n) for n in range(300)])
        await worker.drained()
        assert await books.applied(backend) == once(*range(300))
        assert witness.total("delivery.acked") == 300
        assert await backend.pending(STREAM, GROUP) == []


async def test_attempts_that_fail_have_no_effects(backend: Backend) -> None:
    books = Books()
    async with at_work(backend, books) as (bus, _, worker):
        await bus.publish(Paid(n=1, kind="flaky"))
        await worker.drained()
    assert books.runs == [(1, 1), (1, 2), (1, 3)]
    assert await books.applied(backend) == once(1)


async def test_what_is_taken_over_from_a_dead_worker_has_its_effects_once(
    backend: Backend, quick_sweeps: None
) -> None:
    books = Books(visibility_s=0.5)
    async with backend.bus() as (bus, witness):
        await backend.redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
        await bus.publish_many([Paid(n=n) for n in (1, 2)])
        await backend.redis.xreadgroup(GROUP, "gone", {STREAM: ">"})
        async with Worker(bus, [books.handler]) as worker:
            await eventually(lambda: len(books.runs) == 2)
            await worker.drained()
        assert witness.total("delivery.reclaimed") == 2
    assert await books.applied(backend) == once(1, 2)
    assert await backend.pending(STREAM, GROUP) == []


@pytest.mark.servers_only("an answer is lost with a connection")
async def test_a_lost_answer_is_asked_for_again_and_changes_nothing(backend: Backend) -> None:
    books = Books()
    port = int(backend.url.rpartition(":")[2].partition("/")[0])
    await backend.redis.script_load(verbs._commit._text)
    async with Proxy(port) as proxy:
        through = Backend(proxy.url)
        async with at_work(through, books) as (bus, witness, worker):
            for n in range(1, 10):
                proxy.lose(digest(verbs._commit), 1)
                await bus.publish(Paid(n=n, kind="text" if n == 5 else "good"))
                await eventually(lambda n=n: proxy.lost == n)
                await worker.drained()
            await eventually(lambda: witness.total("delivery.acked") == 8)
            (told,) = witness.of("delivery.dead_lettered")
            assert "not undone: INCRBY sum, HINCRBY times" in told["error"]
            await eventually(lambda: books.dead == [(5, "effects-failed")])
            assert len(witness.of("verdict.failed")) == 9
            assert witness.of("delivery.refused") == []
        await through.close()
    assert await books.applied(backend) == once(*range(1, 10))
    assert len(await backend.dead(STREAM, GROUP)) == 1
    assert sorted(books.runs) == [(n, 1) for n in range(1, 10)]


async def test_of_a_delivery_that_another_worker_owns_nothing_is_applied(backend: Backend) -> None:
    books = Books()
    books.go_on.clear()
    async with at_work(backend, books) as (bus, witness, worker):
        receipts = await bus.publish_many([Paid(n=n) for n in (1, 2)])
        await eventually(lambda: len(books.runs) == 2)
        await backend.redis.xclaim(STREAM, GROUP, "thief", 0, [receipts[0].entry_id])
        books.go_on.set()
        await eventually(lambda: not worker._consumers[0].busy)
        assert witness.total("delivery.refused", verb="commit") == 1
        assert witness.total("delivery.acked") == 1
        assert await books.applied(backend) == once(2), "its neighbour's are"
        (left,) = await backend.pending(STREAM, GROUP)
        assert (left.entry_id, left.owner) == (receipts[0].entry_id, "thief")


async def test_of_a_delivery_that_was_acked_by_hand_nothing_is_applied(backend: Backend) -> None:
    books = Books()
    books.go_on.clear()
    async with at_work(backend, books) as (bus, witness, worker):
        receipt = await bus.publish(Paid(n=1))
        await books.running.wait()
        await backend.redis.xack(STREAM, GROUP, receipt.entry_id)
        books.go_on.set()
        await worker.drained()
        assert witness.total("delivery.refused") == 1
    assert await books.applied(backend) == {}


async def test_a_group_that_is_destroyed_meanwhile_has_the_effects_once(backend: Backend) -> None:
    """The worker makes it again, and it delivers the entry again: to whom it runs still."""
    books = Books()
    books.go_on.clear()
    async with at_work(backend, books) as (bus, witness, worker):
        await bus.publish(Paid(n=1))
        await books.running.wait()
        await backend.redis.xgroup_destroy(STREAM, GROUP)
        await eventually(lambda: witness.of("group.recreated"))
        books.go_on.set()
        await worker.drained()
        assert await backend.pending(STREAM, GROUP) == []
    assert await books.applied(backend) == once(1)


async def test_an_entry_deleted_by_hand_meanwhile_has_its_effects_all_the_same(
    backend: Backend,
) -> None:
    """If they fail, all that is left of it is a dead letter with its id and no body."""
    books = Books()
    books.go_on.clear()
    async with at_work(backend, books) as (bus, _, worker):
        receipts = await bus.publish_many([Paid(n=1), Paid(n=2, kind="text")])
        await eventually(lambda: len(books.runs) == 2)
        await backend.redis.xdel(STREAM, *(r.entry_id for r in receipts))
        books.go_on.set()
        await worker.drained()
        assert await books.applied(backend) == once(1, 2)
        assert await backend.pending(STREAM, GROUP) == []
        (letter,) = await backend.dead(STREAM, GROUP)
        assert letter["deadentry"].decode() == receipts[1].entry_id
        assert "data" not in letter


# --- in an inbox


async def put(backend: Backend, n: int, kind: str = "good", **fields: Any) -> str:
    data = json.dumps({"n": n, "kind": kind}).encode()
    return await backend.add(INBOX, {"id": f"e{n}", "type": "ledger.paid", "data": data, **fields})


async def test_entries_of_an_inbox_have_effects_and_are_deleted(backend: Backend) -> None:
    books = Books()
    async with at_work(backend, books) as (_, witness, worker):
        await put(backend, 1)
        await put(backend, 2, origentry="5-0", attempts="3", due="0", run="r-1")
        await eventually(lambda: len(books.runs) == 2)
        await worker.drained()
        assert witness.total("delivery.acked") == 2
    assert sorted(books.runs) == [(1, 1), (2, 4)]
    assert await books.applied(backend) == once(1, 2)
    assert await backend.entries(INBOX) == {}


async def test_a_dead_letter_of_an_inbox_entry_is_that_of_the_entry_it_was(
    backend: Backend,
) -> None:
    """Its own field of such a name stays; what was added for the inbox goes."""
    books = Books()
    async with at_work(backend, books) as (_, _, worker):
        moved = {"origentry": "5-7", "attempts": "1", "due": "0", "run": "r-1"}
        plain = await put(backend, 1, "text", source="/here")
        pairs = [*{"id": "e2", "type": "ledger.paid"}.items()]
        pairs += [("data", '{"n":2,"kind":"text"}'), ("x", "y"), ("attempts", "own")]
        flat = [part for pair in (*pairs, *moved.items()) for part in pair]
        await backend.redis.execute_command("XADD", INBOX, "*", *flat)
        await eventually(lambda: len(books.runs) == 2)
        await worker.drained()
    first, second = sorted(await backend.dead(STREAM, GROUP), key=lambda letter: letter["id"])
    assert (first["deadentry"].decode(), first["deadattempts"]) == (plain, b"1")
    assert first["source"] == b"/here"
    assert (second["deadentry"], second["deadattempts"]) == (b"5-7", b"2")
    assert (second["attempts"], second["x"]) == (b"own", b"y")
    assert not second.keys() & {"origentry", "due", "run"}
    assert await backend.entries(INBOX) == {}
    assert len(books.runs) == 2


# --- when a command fails


async def test_a_wrong_type_changes_nothing_and_is_a_failed_attempt(backend: Backend) -> None:
    """As if the handler had raised: tried again, told, and a dead letter in the end."""
    books = Books(max_attempts=3)
    async with at_work(backend, books) as (bus, witness, worker):
        await bus.publish_many([Paid(n=1, kind="mistyped outside"), Paid(n=2)])
        await worker.drained()
        assert await books.applied(backend) == once(2)
        assert sorted(books.runs) == [(1, 1), (1, 2), (1, 3), (2, 1)]
        retried = witness.of("delivery.retried")
        assert [(f["error_type"], f["attempt"]) for f in retried] == [
            ("EffectsFailed", 1),
            ("EffectsFailed", 2),
        ]
        (letter,) = await backend.dead(STREAM, GROUP)
        assert (letter["deadreason"], letter["deadattempts"]) == (b"failed", b"3")
        wrong = b"EffectsFailed: WRONGTYPE a set is a set, not a string; nothing was applied"
        assert letter["deaderror"] == wrong
        assert books.dead == [(1, "failed")]


async def test_a_type_that_is_mended_in_time_costs_an_attempt_and_no_event(
    backend: Backend,
) -> None:
    books = Books(max_attempts=50)
    async with at_work(backend, books) as (bus, witness, worker):
        await bus.publish(Paid(n=1, kind="mistyped outside"))
        await eventually(lambda: len(witness.of("delivery.retried")) >= 2)
        await backend.redis.delete("a set")
        await worker.drained()
        assert await books.applied(backend) == once(1)
        assert await backend.dead(STREAM, GROUP) == []


async def test_effects_that_are_refused_open_the_breaker(backend: Backend) -> None:
    """A counter that is none any more is an outage of what handlers need: no event dies of it."""
    breaker = Breaker(window_s=5, min_calls=10, probe_s=0.2, failure_ratio=0.9)
    books = Books(max_attempts=2, breaker=breaker, dead_letter_maxlen=5)
    async with at_work(backend, books) as (bus, witness, worker):
        await bus.publish_many([Paid(n=n, kind="mistyped outside") for n in range(300)])
        await eventually(lambda: witness.of("breaker.opened"))
        await backend.redis.delete("a set")
        await worker.drained()
        assert await books.applied(backend) == once(*range(300))
        assert await backend.dead(STREAM, GROUP) == []


@pytest.mark.servers_only("it takes an access list")
async def test_a_key_that_the_user_may_not_use_is_the_failure_of_its_delivery_alone(
    private_server: PrivateServer, server_kind: str
) -> None:
    """The server refuses the whole script for one key; the worker finds out whose it was."""
    server = private_server(server_kind)
    ask(
        server,
        "ACL",
        "SETUSER",
        "clerk",
        *["on", ">pw", "~bus:*", "~sum", "~times", "~a*", "~t*", "~f*", "+@all"],
    )
    backend = Backend(server.url.replace("redis://", "redis://clerk:pw@"))
    books = Books(max_attempts=2)
    books.go_on.clear()

    async def forbidden(event: Paid, delivery: Delivery[Paid]) -> None:
        await handle(event, delivery)
        if event.n % 10 == 0:
            delivery.effects.incrby("secret")

    handle = books.handler.call
    books.handler = replace(books.handler, call=forbidden)
    async with at_work(backend, books) as (bus, _, worker):
        await bus.publish_many([Paid(n=n) for n in range(1, 61)])
        await eventually(lambda: len(books.runs) == 60)
        books.go_on.set()
        await worker.drained()
        assert await books.applied(backend) == once(*(n for n in range(1, 61) if n % 10))
        letters = await backend.dead(STREAM, GROUP)
        assert sorted(json.loads(f["data"])["n"] for f in letters) == [10, 20, 30, 40, 50, 60]
        assert {f["deadreason"] for f in letters} == {b"failed"}
        assert all(b"secret" in f["deaderror"] for f in letters)
    await backend.close()


async def test_a_transaction_in_a_handler_that_failed_half_way_is_not_repeated(
    backend: Backend,
) -> None:
    runs: list[int] = []

    @event_handler(Paid, group="pays", breaker=None, backoff=SOON)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        runs.append(delivery.attempt)
        async with delivery.bus.transaction() as change:
            if event.n == 1:
                change.incrby("paid", 10)
            change.incrby("a text")

    await backend.redis.set("a text", "many")
    async with backend.bus() as (bus, _), Worker(bus, [handle]) as worker:
        await bus.publish(Paid(n=1))
        await worker.drained()
        assert (await backend.redis.get("paid"), runs) == (b"10", [1])
        (letter,) = await backend.dead(STREAM, "pays")
        assert letter["deadreason"] == b"effects-failed"
        assert b"INCRBY paid" in letter["deaderror"]
        runs.clear()
        await bus.publish(Paid(n=2))  # of this one nothing is applied: it may be tried again
        await worker.drained()
        assert runs == [1, 2, 3, 4, 5]


async def test_events_that_may_not_come_take_no_room_from_others(backend: Backend) -> None:
    """One place is left in the reserve; a hundred deliveries might need it, and none does."""

    @event_handler(Paid, group="warns", concurrency=100)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        left = delivery.effects.incrby("left", -1)
        for n in range(5):
            delivery.effects.publish(Booked(key="k", n=n), when=left.at_most(-1_000))

    small = Topic("booking", maxlen=12, keep=2)
    async with backend.bus(topics=[small]) as (bus, witness):
        out = "bus:{booking:0}"
        await backend.redis.xgroup_create(out, "sloth", "0", mkstream=True)
        async with Worker(bus, [handle]) as worker:
            await bus.publish(Paid(n=0))
            await worker.drained()
            for n in range(12 + 1_000 - 5):
                await backend.redis.xadd(out, {"n": n})
            await bus.publish_many([Paid(n=n) for n in range(100)])
            await worker.drained()
            assert await backend.redis.get("left") == b"-101"
            assert witness.of("delivery.postponed") == []
            assert await backend.redis.xlen(out) == 12 + 1_000 - 5


async def test_events_that_did_not_come_drop_nothing(backend: Backend) -> None:
    @event_handler(Paid, group="warns")
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        left = delivery.effects.incrby("left", -1)
        delivery.effects.publish(Booked(key="k", n=event.n), when=left.equals(-event.n))

    small = Topic("booking", maxlen=12, keep=2, on_full="drop_oldest")
    async with backend.bus(topics=[small]) as (bus, witness):
        out = "bus:{booking:0}"
        await backend.redis.xgroup_create(out, "sloth", "0", mkstream=True)
        async with Worker(bus, [handle]) as worker:
            most = 12 + 1_000
            for n in range(most):
                await backend.redis.xadd(out, {"n": n})
            await bus.publish_many([Paid(n=-1) for n in range(50)])
            await worker.drained()
            assert await backend.redis.xlen(out) == most
            assert witness.of("delivery.overrun") == []
            await bus.publish(Paid(n=51))
            await worker.drained()
            assert await backend.redis.xlen(out) == most, "one came, and one went"
            ((_, fields),) = await backend.redis.xrevrange(out, count=1)
            assert json.loads(fields[b"data"])["n"] == 51


async def test_what_failed_half_way_is_a_whole_dead_letter(backend: Backend) -> None:
    books = Books(max_attempts=5)
    async with at_work(backend, books, source="/tests") as (bus, witness, worker):
        receipt = await bus.publish(Paid(n=1, kind="text"))
        await worker.drained()
        (letter,) = await backend.dead(STREAM, GROUP)
        (entry,) = (await backend.entries(STREAM)).values()
        assert {k: v for k, v in letter.items() if not k.startswith("dead")} == entry
        assert (letter["deadreason"], letter["deadattempts"]) == (b"effects-failed", b"1")
        assert letter["deadtraceback"] == b""
        assert letter["deadentry"].decode() == receipt.entry_id
        seconds, micros = await backend.redis.time()
        assert 0 <= seconds * 1000 + micros // 1000 - int(letter["deadtime"]) < 20_000
        assert await backend.pending(STREAM, GROUP) == []
        (told,) = witness.of("delivery.dead_lettered")
        assert (told["reason"], told["error_type"], told["attempt"]) == (
            "effects-failed",
            "EffectsFailed",
            1,
        )
        await eventually(lambda: books.dead == [(1, "effects-failed")])
        assert witness.of("delivery.acked") == []
    assert await books.applied(backend) == once(1)
    assert books.runs == [(1, 1)]


@pytest.mark.parametrize("kind", ["text", "overflow"])
async def test_one_that_fails_half_way_keeps_what_was_written_and_never_runs_again(
    backend: Backend, kind: str
) -> None:
    books = Books(max_attempts=5)
    async with at_work(backend, books) as (bus, witness, worker):
        await bus.publish(Paid(n=7, kind=kind))
        await worker.drained()
        (letter,) = await backend.dead(STREAM, GROUP)
        assert letter["deadapplied"] == b"INCRBY sum\nHINCRBY times"
        words = {"text": b"HINCRBY texts: ", "overflow": b"INCRBY full: "}[kind]
        assert letter["deaderror"].startswith(b"EffectsFailed: " + words)
        assert letter["deadattempts"] == b"1"
        (told,) = witness.of("delivery.dead_lettered", reason="effects-failed")
        assert "applied before, and not undone: INCRBY sum, HINCRBY times" in told["error"]
        await eventually(lambda: books.dead == [(7, "effects-failed")])
    assert await books.applied(backend) == once(7)
    assert books.runs == [(7, 1)]
    assert not await backend.redis.exists("never")


async def test_what_on_dead_is_told_late_is_a_dead_letter_already(backend: Backend) -> None:
    """And what it publishes is caused by the delivery, deep enough to end, and uses the reserve."""
    found: list[int] = []
    caused: list[dict[str, bytes]] = []

    async def on_dead(dead: DeadLettered, bus: Any) -> None:
        found.append(len(await backend.dead(STREAM, "late")))
        receipt = await bus.publish(Booked(key="k"))
        caused.append((await backend.entries(receipt.stream))[receipt.entry_id])

    @event_handler(Paid, group="late", on_dead=on_dead, timeout_s=10)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        delivery.effects.sadd("a set", "a")
        delivery.effects.incrby("a text")

    await backend.redis.set("a text", "many")
    full = Topic("booking", maxlen=3, keep=1)
    async with backend.bus(topics=[full]) as (bus, witness), Worker(bus, [handle]) as worker:
        await backend.redis.xgroup_create("bus:{booking:0}", "sloth", "0", mkstream=True)
        await bus.publish_many([Booked(key="a"), Booked(key="b")])
        await bus.publish(Booked(key="c"))
        receipt = await bus.publish(Paid(n=1))
        await worker.drained()
        await eventually(lambda: caused)
        assert found == [1]
        assert caused[0]["causationid"].decode() == receipt.event_id
        assert caused[0]["causationdepth"] == b"1"
        assert witness.of("on_dead.failed") == []


async def test_a_failure_of_on_dead_is_told(backend: Backend) -> None:
    async def on_dead(dead: DeadLettered, bus: Any) -> None:
        await asyncio.Event().wait()

    @event_handler(Paid, group="hangs", on_dead=on_dead, timeout_s=0.2)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        delivery.effects.sadd("a set", "a")
        delivery.effects.incrby("a text")

    await backend.redis.set("a text", "many")
    async with backend.bus() as (bus, witness):
        async with Worker(bus, [handle]):
            await bus.publish(Paid(n=1))
            await eventually(lambda: witness.of("on_dead.failed"))
        assert witness.of("on_dead.failed")[0]["error_type"] == "CancelledError"


async def test_of_a_hundred_that_share_a_script_each_has_its_own_fate(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    inner = backend.verbs.commit

    async def counted(self: Any, *args: Any) -> Any:
        answer = await inner(self, *args)
        together.append(len(answer[0]))
        return answer

    monkeypatch.setattr(backend.verbs, "commit", counted)
    kinds = {10: "mistyped outside", 31: "text", 32: "text", 50: "overflow", 99: "mistyped outside"}
    books = Books(max_attempts=1)
    books.go_on.clear()
    async with at_work(backend, books) as (bus, witness, worker):
        await bus.publish_many([Paid(n=n, kind=kinds.get(n, "good")) for n in range(100)])
        await eventually(lambda: len(books.runs) == 100)
        books.go_on.set()
        await worker.drained()
        assert together == [100]
        letters = {json.loads(f["data"])["n"]: f for f in await backend.dead(STREAM, GROUP)}
        assert letters.keys() == kinds.keys()
        assert [n for n, f in letters.items() if "deadapplied" in f] == [31, 32, 50]
        assert witness.total("delivery.acked") == 95
        assert len(witness.of("delivery.dead_lettered")) == 5
    assert await books.applied(backend) == once(*(set(range(100)) - {10, 99}))
    assert sorted(n for n, _ in books.runs) == list(range(100)), "each ran once"
    assert await backend.pending(STREAM, GROUP) == []


async def test_full_dead_letters_are_no_reason_to_run_it_again(backend: Backend) -> None:
    books = Books(dead_letter_maxlen=1)
    async with at_work(backend, books) as (bus, witness, worker):
        await bus.publish_many([Paid(n=n, kind="text") for n in range(3)])
        await worker.drained()
        assert len(await backend.dead(STREAM, GROUP)) == 3
        assert witness.of("dead_letters.full") == []
    assert await books.applied(backend) == once(0, 1, 2)
    assert sorted(books.runs) == [(n, 1) for n in range(3)]


async def test_dead_letters_that_are_no_stream_hold_up_nobody(backend: Backend) -> None:
    """What failed half way stays pending, in a lane that is never due: it must not run again."""
    books = Books()
    await backend.redis.set(DEAD, "a string")
    async with at_work(backend, books) as (bus, witness, _):
        await bus.publish_many([Paid(n=n, kind="text" if n == 2 else "good") for n in range(5)])
        await eventually(lambda: witness.total("delivery.acked") == 4)
        await eventually(lambda: books.dead == [(2, "effects-failed")])
        assert await books.applied(backend) == once(*range(5))
        (left,) = await backend.pending(STREAM, GROUP)
        assert left.owner == "parked:999999999999999"
    assert sorted(books.runs) == [(n, 1) for n in range(5)], "none ran again"


@pytest.mark.servers_only("it takes a maxmemory")
async def test_without_memory_effects_wait_and_go_on_by_themselves(
    private_server: PrivateServer, server_kind: str
) -> None:
    """Also those that could not even become dead letters."""
    server = private_server(server_kind)
    backend = Backend(server.url)
    books = Books(visibility_s=5)
    books.go_on.clear()
    kinds = {3: "text", 4: "mistyped outside"}
    async with at_work(backend, books) as (bus, witness, worker):
        await bus.publish_many([Paid(n=n, kind=kinds.get(n, "good")) for n in range(20)])
        await eventually(lambda: len(books.runs) == 20)
        ask(server, "CONFIG", "SET", "maxmemory", "1")
        books.go_on.set()
        await eventually(lambda: len(witness.of("verdict.failed")) >= 3)
        assert {f["error"].split()[0] for f in witness.of("verdict.failed")} == {"OOM"}
        assert await books.applied(backend) == {}
        assert len(await backend.pending(STREAM, GROUP)) == 20
        ask(server, "CONFIG", "SET", "maxmemory", "0")
        await worker.drained()
        assert witness.of("delivery.refused") == []
    assert await books.applied(backend) == once(*(set(range(20)) - {4}))
    assert len(await backend.dead(STREAM, GROUP)) == 2
    assert sorted(r for r in books.runs if r[0] != 4) == [(n, 1) for n in range(20) if n != 4]
    await backend.close()


# --- events among them


@pytest.fixture
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five entries, and a short wait for what finds even those taken."""
    monkeypatch.setattr("bus.streams.topics.RESERVE", 5)
    monkeypatch.setattr("bus.worker.commits.NOT_PUBLISHED_PARK_S", 0.05)


async def test_events_are_published_once_in_order_and_with_their_cause(backend: Backend) -> None:
    """A retry makes the same ids again, as a publish in the body does."""
    tried: list[list[str]] = []

    @event_handler(Paid, group=GROUP, backoff=SOON)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        effects = delivery.effects
        for n in range(3):
            effects.publish(Booked(key="k", n=n))
        effects.publish(Booked(key="k", n=3), event_id="mine", causation_id="other")
        tried.append([sent.event_id for sent in effects.sent])
        if delivery.attempt < 3:
            raise ValueError("not yet")

    async with backend.bus() as (bus, witness), Worker(bus, [handle]) as worker:
        receipt = await bus.publish(Paid(n=1), correlation_id="chain")
        await worker.drained()
        assert witness.total("effects.published") == 4
    booked = list((await backend.entries("bus:{booking:0}")).values())
    assert [json.loads(f["data"])["n"] for f in booked] == [0, 1, 2, 3]
    assert tried == [[f["id"].decode() for f in booked]] * 3
    assert len(set(tried[0])) == 4
    assert [f["causationid"].decode() for f in booked] == [receipt.event_id] * 3 + ["other"]
    assert {(f["correlationid"], f["causationdepth"]) for f in booked} == {(b"chain", b"1")}


async def test_events_depend_on_conditions_like_any_effect(backend: Backend) -> None:
    @event_handler(Paid, group=GROUP, concurrency=20)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        left = delivery.effects.hincrby("quota", "tokens", -1)
        delivery.effects.publish(Booked(key="used up"), when=left.equals(0))

    await backend.redis.hset("quota", "tokens", 30)
    async with backend.bus() as (bus, _), Worker(bus, [handle]) as worker:
        await bus.publish_many([Paid(n=n) for n in range(50)])
        await worker.drained()
    assert len(await backend.entries("bus:{booking:0}")) == 1
    assert await backend.redis.hget("quota", "tokens") == b"-20"


async def test_events_go_to_their_topics_and_partitions(backend: Backend) -> None:
    keys = [f"key-{n}" for n in range(12)]

    @event_handler(Paid, group=GROUP)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        for key in keys:
            delivery.effects.publish(Booked(key=key))
        delivery.effects.publish(Paid(n=2), when=delivery.effects.incrby("runs").equals(1))

    spread = Topic("booking", partitions=3)
    async with backend.bus(topics=[spread]) as (bus, witness), Worker(bus, [handle]) as worker:
        expected = await bus.publish_many([Booked(key=key) for key in keys])
        await bus.publish(Paid(n=1))
        await worker.drained()
        assert await backend.redis.get("runs") == b"2"
        assert witness.total("effects.published", stream=STREAM) == 1
    wanted = Counter(r.stream for r in expected)
    assert len(wanted) == 3
    for stream, count in wanted.items():
        found = [f["partitionkey"] for f in (await backend.entries(stream)).values()]
        assert found == found[:count] * 3, "beside the events of the same keys"


async def test_published_effects_trim_what_nobody_needs(backend: Backend) -> None:
    @event_handler(Paid, group=GROUP, concurrency=1)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        for n in range(10):
            delivery.effects.publish(Booked(key="k", n=n))

    marks = Topic("booking", maxlen=200, keep=20)
    async with backend.bus(topics=[marks]) as (bus, _), Worker(bus, [handle]) as worker:
        for n in range(100):
            await bus.publish(Paid(n=n))
        await worker.drained()
    assert 20 <= await backend.redis.xlen("bus:{booking:0}") < 20 + 18 + 100 + 10


async def test_where_even_the_reserve_is_full_the_delivery_waits_without_an_attempt(
    backend: Backend, small_reserve: None, quick_sweeps: None
) -> None:
    attempts: list[int] = []

    @event_handler(Paid, group=GROUP, max_attempts=2, concurrency=8)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        attempts.append(delivery.attempt)
        delivery.effects.incrby("runs")
        delivery.effects.publish(Booked(key="k", n=event.n))
        delivery.effects.publish(Booked(key="k", n=-event.n))

    marks = Topic("booking", maxlen=10, keep=2)
    async with backend.bus(topics=[marks]) as (bus, witness), Worker(bus, [handle]) as worker:
        stream = "bus:{booking:0}"
        await backend.redis.xgroup_create(stream, "sloth", "0", mkstream=True)
        await bus.publish_many([Booked(key="k") for _ in range(8)])
        await bus.publish_many([Paid(n=n) for n in range(1, 9)])
        await eventually(lambda: len(witness.of("delivery.postponed")) >= 8)
        assert await backend.redis.xlen(stream) == 14, "15 would be half a delivery"
        assert await backend.redis.get("runs") == b"3"
        told = witness.of("delivery.postponed")
        assert {(t["delay_s"], t["attempt"]) for t in told} == {(0.05, 1)}
        assert f"no room in {stream}" in told[0]["reason"]
        await backend.redis.xgroup_setid(stream, "sloth", "$")
        await worker.drained()
        assert witness.of("delivery.retried") == []
    assert set(attempts) == {1}
    assert await backend.redis.get("runs") == b"8"


async def test_no_delivery_is_half_in_where_a_few_of_a_batch_fit(
    backend: Backend, small_reserve: None
) -> None:
    """Two share a script and there is room for one: that one is done, the other waits."""
    release = asyncio.Event()
    runs: list[int] = []

    @event_handler(Paid, group=GROUP, concurrency=8)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        runs.append(event.n)
        for _ in range(event.n):
            delivery.effects.publish(Booked(key="k", n=event.n))
        await release.wait()

    marks = Topic("booking", maxlen=10, keep=2)
    async with backend.bus(topics=[marks]) as (bus, witness), Worker(bus, [handle]):
        stream = "bus:{booking:0}"
        await backend.redis.xgroup_create(stream, "sloth", "0", mkstream=True)
        await bus.publish_many([Booked(key="k") for _ in range(8)])  # 7 fit
        await bus.publish_many([Paid(n=n) for n in (5, 4, 2)])
        await eventually(lambda: len(runs) == 3)
        release.set()
        await eventually(lambda: witness.of("delivery.postponed"))
        booked = [json.loads(f["data"])["n"] for f in (await backend.entries(stream)).values()]
        assert booked[8:] == [5] * 5 + [2] * 2
        assert witness.total("delivery.acked") == 2


async def test_dropping_the_oldest_makes_room_for_effects_too(
    backend: Backend, small_reserve: None
) -> None:
    @event_handler(Paid, group=GROUP, concurrency=1)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        delivery.effects.publish(Booked(key="k", n=event.n))

    marks = Topic("booking", maxlen=10, keep=2, on_full="drop_oldest")
    async with backend.bus(topics=[marks]) as (bus, witness), Worker(bus, [handle]) as worker:
        stream = "bus:{booking:0}"
        await backend.redis.xgroup_create(stream, "sloth", "0", mkstream=True)
        for n in range(40):
            await bus.publish(Paid(n=n))
            await worker.drained()
        assert witness.of("delivery.postponed") == []
    booked = [json.loads(f["data"])["n"] for f in (await backend.entries(stream)).values()]
    assert booked == list(range(25, 40))
    assert witness.total("delivery.overrun", group="sloth") == 25
    assert await backend.redis.hget(f"{stream}:overrun", "sloth") == b"25"


async def test_a_stream_of_another_type_fails_those_that_publish_there_alone(
    backend: Backend,
) -> None:
    release = asyncio.Event()

    @event_handler(Paid, group=GROUP, max_attempts=1, breaker=None)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        await release.wait()
        delivery.effects.incrby("runs")
        if event.n == 2:
            delivery.effects.publish(Booked(key="k"))

    await backend.redis.set("bus:{booking:0}", "a string")
    async with backend.bus() as (bus, _), Worker(bus, [handle]) as worker:
        await bus.publish_many([Paid(n=n) for n in (1, 2, 3)])
        release.set()
        await worker.drained()
        (letter,) = await backend.dead(STREAM, GROUP)
    assert b"WRONGTYPE bus:{booking:0} is a string, not a stream" in letter["deaderror"]
    assert await backend.redis.get("runs") == b"2"


async def test_an_event_with_bytes_that_are_no_text_travels_as_it_is(backend: Backend) -> None:
    blob = bytes(range(256))

    class Scanned(Event, type="scan.scanned", encoding="msgpack"):
        blob: bytes

    @event_handler(Paid, group=GROUP)
    async def handle(event: Paid, delivery: Delivery[Paid]) -> None:
        delivery.effects.publish(Scanned(blob=blob))
        was = delivery.effects.get("blob")
        delivery.effects.set("blob", blob, when=was.missing())
        delivery.effects.incrby("known", when=was.equals(blob))

    async with backend.bus() as (bus, _), Worker(bus, [handle]) as worker:
        for n in range(2):
            await bus.publish(Paid(n=n))
            await worker.drained()
        assert [e.event async for e in bus.history("scan")] == [Scanned(blob=blob)] * 2
    assert (await backend.redis.get("blob"), await backend.redis.get("known")) == (blob, b"1")
