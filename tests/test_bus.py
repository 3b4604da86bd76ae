"""The facade: what `connect` accepts, and the life of a bus."""

from __future__ import annotations

import asyncio
import re

import pytest

from bus import (
    Bus,
    DeclarationError,
    Event,
    NotSupported,
    ServerUnreachable,
    ServerUnsuitable,
    Topic,
    TopicMismatch,
)
from bus.config import MAX_EVENT_BYTES, PRODUCER_MEMORY_S, PUBLISH_TIMEOUT_S
from tests.proxy import listening
from tests.servers import ask

CANARY = "s3cret-passw0rd"


class Started(Event, type="facade.started"):
    n: int = 0


class Spread(Event, type="facade.spread", topic="facadespread", key="key"):
    key: str


async def test_entering_checks_the_server_and_leaving_closes(url):
    async with Bus.connect(url) as bus:
        receipt = await bus.publish(Started())
        assert await bus.redis.get("nothing") is None
    assert receipt.stream == "bus:{facade:0}"
    await bus.close()  # twice is no error


async def test_a_bus_can_be_used_without_a_block(valkey_url):
    bus = Bus.connect(valkey_url)
    await bus.ready()
    await bus.publish(Started())
    await bus.close()
    await bus.close()


async def test_a_bus_that_was_never_used_can_be_closed():
    bus = Bus.connect("redis://nowhere.invalid")
    await bus.close()


async def test_the_url_may_come_from_the_environment(valkey_url, monkeypatch):
    monkeypatch.setenv("BUS_URL", valkey_url)
    async with Bus.connect() as bus:
        assert repr(bus) == f"<Bus {valkey_url}>"
    monkeypatch.delenv("BUS_URL")
    assert repr(Bus.connect()) == "<Bus redis://localhost:6379/0>"
    assert repr(Bus.connect("redis://elsewhere")) == "<Bus redis://elsewhere:6379/0>"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://:{CANARY}@h", "<Bus redis://:***@h:6379/0>"),
        (f"redis://user:{CANARY}@h:1/2", "<Bus redis://user:***@h:1/2>"),
        (f"rediss://user:{CANARY}@h", "<Bus rediss://user:***@h:6379/0>"),
        (f"unix://:{CANARY}@/run/r.sock", "<Bus unix://:***@/run/r.sock>"),
    ],
)
def test_no_password_is_shown(url, shown, monkeypatch):
    assert repr(Bus.connect(url)) == shown
    monkeypatch.setenv("BUS_URL", url)
    assert repr(Bus.connect()) == shown


async def test_nobody_there(private_server):
    server = private_server()
    url = server.url
    server.stop()
    with pytest.raises(ServerUnreachable, match=re.escape(f"nobody answers at {url}")):
        async with Bus.connect(url):
            pass


async def test_an_evicting_server_only_if_one_says_so(private_server):
    server = private_server(extra_args=("--maxmemory-policy", "allkeys-lru"))
    with pytest.raises(ServerUnsuitable, match="allkeys-lru"):
        async with Bus.connect(server.url):
            pass
    async with Bus.connect(server.url, allow_eviction=True) as bus:
        await bus.publish(Started())


async def test_a_server_that_hangs_up_at_the_start_is_unreachable():
    """As a proxy does whose server is away."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async with listening(hang_up) as url:
        with pytest.raises(ServerUnreachable):
            async with Bus.connect(url):
                pass


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"publish_timeout_s": 0}, "publish_timeout_s must be a number from 0.01 to"),
        ({"publish_timeout_s": PRODUCER_MEMORY_S / 2}, "publish_timeout_s must be a number"),
        ({"publish_timeout_s": "30"}, "publish_timeout_s must be a number"),
        ({"publish_timeout_s": None}, "publish_timeout_s must be a number"),
        ({"publish_timeout_s": True}, "publish_timeout_s must be a number"),
        ({"publish_timeout_s": float("nan")}, "publish_timeout_s must be a number"),
        ({"max_event_bytes": 63}, "max_event_bytes must be a whole number from 64 to"),
        ({"max_event_bytes": 9 * 1024 * 1024}, "max_event_bytes must be a whole number"),
        ({"max_event_bytes": 1024.0}, "max_event_bytes must be a whole number"),
        ({"topics": "facade"}, "topics is a list of Topic(...), not a string"),
        ({"topics": ["facade"]}, "topics are declared as Topic(...), not 'facade'"),
        ({"topics": [Topic("a"), Topic("a", partitions=2)]}, "topic a is declared twice"),
        ({"url": "localhost"}, "the URL has no scheme"),
        ({"url": "amqp://localhost"}, "amqp:// is no known scheme"),
    ],
)
def test_bad_parameters_are_refused_at_once(setting, says):
    with pytest.raises(DeclarationError, match=re.escape(says)):
        Bus.connect(**setting)


@pytest.mark.parametrize(
    "setting",
    [
        *({"durability": "replicated"}, {"durability": "fsynced"}, {"durability": 2}),
        *({"url": "redis+sentinel://h/m"}, {"url": "redis+cluster://h"}),
    ],
    ids=str,
)
def test_what_this_release_cannot_do_is_said(setting):
    with pytest.raises(NotSupported, match="is not part of this release"):
        Bus.connect(**setting)


def test_the_defaults_are_those_of_the_configuration():
    bus = Bus.connect("redis://h")
    assert bus._settings == {
        "publish_timeout_s": PUBLISH_TIMEOUT_S,
        "max_event_bytes": MAX_EVENT_BYTES,
        "source": None,
    }


async def test_topics_are_declared_on_the_way_in(url, server):
    async with Bus.connect(url, topics=(t for t in [Topic("facadespread", partitions=8)])) as bus:
        receipts = await bus.publish_many(Spread(key=str(n)) for n in range(100))
    assert len({r.stream for r in receipts}) == 8
    assert b'{"partitions":8,' in ask(server, "HGET", "bus:topics", "facadespread")


async def test_a_process_with_another_partition_count_is_refused(url):
    async with Bus.connect(url, topics=[Topic("facadespread", partitions=8)]) as bus:
        await bus.publish(Spread(key="k"))
    other = Bus.connect(url, topics=[Topic("facadespread", partitions=4)])
    with pytest.raises(TopicMismatch, match="with 4 partitions here and recorded with 8"):
        await other.publish(Spread(key="k"))
    with pytest.raises(TopicMismatch, match="with 4 partitions here and recorded with 8"):
        async with other:
            raise AssertionError("it was not refused at start")


async def test_two_buses_in_one_process_are_two_publishers(url):
    async with Bus.connect(url) as one, Bus.connect(url) as two:
        receipts = await asyncio.gather(
            *(bus.publish(Started(n=n)) for n in range(50) for bus in (one, two))
        )
    assert len({r.entry_id for r in receipts}) == len({r.event_id for r in receipts}) == 100


async def test_the_application_has_a_client_of_its_own(valkey_url):
    async with Bus.connect(valkey_url) as bus:
        assert bus.redis is bus.redis
        await bus.redis.set("own", "state")
        assert await bus.redis.get("own") == b"state"
        pool = bus.redis.connection_pool
        assert pool.max_connections == 50
