"""One connection: pipelined, given up when it hangs, intact when callers leave."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    BusError,
    ServerUnreachable,
)
from bus.streams.address import parse_url
from bus.streams.connection import Connection, ConnectionLost, pack
from bus.streams.server import Standalone
from bus.telemetry import Telemetry
from tests.proxy import Proxy
from tests.servers import ask
from tests.streams.wire import CANARY, connected
from tests.witness import eventually

if TYPE_CHECKING:
    from bus.embedded import EmbeddedServer


async def test_commands_of_one_turn_share_a_write(valkey_url):
    async with Proxy(parse_url(valkey_url).port) as proxy, connected(proxy.url) as connection:
        await connection.call("PING")
        del proxy.requests[:]
        futures = [connection.submit(pack(("ECHO", str(n)))) for n in range(100)]
        assert await asyncio.gather(*futures) == [[str(n).encode()] for n in range(100)]
        assert bytes(proxy.requests) == b"".join(pack(("ECHO", str(n))) for n in range(100))


async def test_no_more_writes_are_on_their_way_than_were_allowed(valkey_url):
    """The third waits for the replies to the first; all replies go to those who asked."""
    async with connected(valkey_url, writes=2) as other, connected(valkey_url) as one:
        for connection, most in ((other, 2), (one, 1)):
            await connection.call("DEL", "never", "now")
            first = connection.submit(pack(("BLPOP", "never", "now", "0")))
            await asyncio.sleep(0)
            more = [connection.submit(pack(("ECHO", "1")))]
            await asyncio.sleep(0)
            more += [connection.submit(pack(("ECHO", str(n)))) for n in (2, 3)]
            await asyncio.sleep(0)
            assert (connection._writes, len(connection._queue)) == (most, 4 - most)
            async with connected(valkey_url) as hand:
                await hand.call("RPUSH", "now", "x")
            assert await first == [[b"now", b"x"]]
            assert await asyncio.gather(*more) == [[b"1"], [b"2"], [b"3"]]
            assert connection._writes == 0


async def test_an_answer_makes_room_for_one_more_write(valkey_url):
    async with connected(valkey_url, writes=2) as connection, connected(valkey_url) as hand:
        await connection.call("DEL", "a", "b")
        waiting = []
        for command in (("BLPOP", "a", "0"), ("BLPOP", "b", "0"), ("ECHO", "1")):
            waiting.append(connection.submit(pack(command)))
            await asyncio.sleep(0)
        await hand.call("RPUSH", "a", "x")
        await waiting[0]
        await eventually(lambda: not connection._queue)
        waiting.append(connection.submit(pack(("ECHO", "2"))))
        await asyncio.sleep(0)
        assert (connection._writes, len(connection._queue)) == (2, 1)
        await hand.call("RPUSH", "b", "y")
        assert await asyncio.gather(*waiting[2:]) == [[b"1"], [b"2"]]


async def test_one_that_hangs_takes_what_was_sent_behind_it_along(private_server):
    server = private_server()
    async with connected(server.url, writes=2) as connection:
        await connection.call("PING")
        server.pause()
        waiting = [connection.submit(pack(("PING",)), timeout_s=0.1)]
        await asyncio.sleep(0)
        waiting.append(connection.submit(pack(("PING",)), timeout_s=60.0))
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [(type(r), r.sent) for r in results] == [(ConnectionLost, True)] * 2
        server.resume()
        assert await connection.call("PING") == b"PONG"


async def test_a_hung_server_is_given_up_after_the_timeout(private_server):
    server = private_server()
    lost: list[dict[str, Any]] = []
    telemetry = Telemetry()
    telemetry.attach("connection.lost", lambda _, fields: lost.append(fields))
    async with connected(server.url, telemetry) as connection:
        await connection.call("PING")
        server.pause()
        with pytest.raises(ConnectionLost) as raised:
            await connection.call("SET", "key", CANARY, timeout_s=0.1)
        assert raised.value.sent
        server.resume()
        assert await connection.call("PING") == b"PONG"
    assert [f["role"] for f in lost] == ["test"]
    assert CANARY not in str(lost) + str(raised.value)


@pytest.mark.parametrize("path", ["0", "1"], ids=["plain", "with a handshake"])
async def test_a_server_that_hangs_while_one_connects_is_given_up_too(
    private_server, monkeypatch, path
):
    """The kernel accepts for a stopped server; SELECT and AUTH then wait for their reply."""
    monkeypatch.setattr("bus.streams.server.CONNECT_TIMEOUT_S", 0.2)
    server = private_server()
    server.pause()
    async with connected(server.url.replace("/0", "/" + path)) as connection, asyncio.timeout(5):
        with pytest.raises((ConnectionLost, ServerUnreachable)):
            await connection.call("PING", timeout_s=0.2)


async def test_what_was_lost_with_the_server_says_whether_it_was_sent(private_server):
    server = private_server()
    async with connected(server.url) as connection:
        await connection.call("PING")
        blocked = connection.submit(pack(("BLPOP", "nothing", "0")))
        await asyncio.sleep(0)  # the request leaves in the next turn of the loop
        await asyncio.to_thread(_until_blocked, server)
        server.kill()
        with pytest.raises(ConnectionLost) as raised:
            await blocked
        assert raised.value.sent
        with pytest.raises(ServerUnreachable):
            await connection.call("PING")
        server.restart()
        assert await connection.call("ECHO", "again") == b"again"


def _until_blocked(server: EmbeddedServer) -> None:
    while b"blocked_clients:1" not in ask(server, "INFO", "clients"):
        pass


async def test_what_was_closed_while_it_was_idle_leaves_nobody_in_doubt(valkey_url):
    """Also where the loop has had no time to notice: it looks before it writes."""
    events: list[str] = []
    telemetry = Telemetry()
    telemetry.attach("*", lambda name, _: events.append(name))
    async with connected(valkey_url, telemetry) as connection:
        for _ in range(5):
            identity = await connection.call("CLIENT", "ID")
            with socket.create_connection(("127.0.0.1", parse_url(valkey_url).port)) as other:
                other.sendall(pack(("CLIENT", "KILL", "ID", identity)))
                assert other.recv(100) == b":1\r\n"
            assert await connection.call("PING") == b"PONG"
            assert await connection.call("CLIENT", "ID") != identity
    assert events == []


async def test_a_server_with_too_many_clients_has_answered_nothing(private_server):
    """It says so before any command is read: that is the answer to none of them."""
    server = private_server()
    async with connected(server.url) as first, connected(server.url) as second:
        await first.call("CONFIG", "SET", "maxclients", 1)
        with pytest.raises(ConnectionLost, match="max number of clients"):
            await second.call("PING")
        await first.call("CONFIG", "SET", "maxclients", 10)
        assert await second.call("PING") == b"PONG"


async def test_what_nobody_asked_for_ends_the_connection(valkey_url):
    """Answers would go to the wrong ones from there on."""
    async with Proxy(parse_url(valkey_url).port) as proxy, connected(proxy.url) as connection:
        assert await connection.call("ECHO", "a") == b"a"
        link = connection._link
        assert link is not None
        link.data_received(b"+STRAY\r\n")
        assert await connection.call("ECHO", "b") == b"b"
        assert connection._link is not link


async def test_what_speaks_another_protocol_is_an_error_of_the_connection(valkey_url):
    async with connected(valkey_url) as connection:
        await connection.call("PING")
        blocked = connection.submit(pack(("BLPOP", "nothing", "0")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert connection._link is not None
        connection._link.data_received(b"HTTP/1.1 400 Bad Request\r\n")
        with pytest.raises(ConnectionLost, match="connection lost: ProtocolError"):
            await blocked
        assert await connection.call("PING") == b"PONG"


async def test_a_lost_reply_is_not_asked_for_again(valkey_url):
    async with Proxy(parse_url(valkey_url).port) as proxy, connected(proxy.url) as connection:
        await connection.call("DEL", "count")
        proxy.lose_replies = 1
        with pytest.raises(ConnectionLost):
            await connection.call("INCR", "count")
        assert await connection.call("GET", "count") == b"1"


async def test_cancelled_callers_leave_the_connection_as_it_was(valkey_url):
    """Each reply goes to the one who asked, however many others stopped waiting."""
    chance = random.Random(7)
    async with connected(valkey_url) as connection:

        async def one(n: int) -> bool:
            text = f"{n}-{'x' * chance.randrange(3000)}"
            return await connection.call("ECHO", text) == text.encode()

        wrong = done = 0
        for round_ in range(40):
            tasks = [asyncio.create_task(one(round_ * 100 + n)) for n in range(50)]
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            for task in chance.sample(tasks, 25):
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                done += result is True
                wrong += result is False
        assert wrong == 0
        assert done >= 1000
        assert await connection.call("ECHO", "end") == b"end"


async def test_closing_answers_everybody_who_waits(valkey_url):
    """What is in flight, what is queued behind it, and what was queued in this very turn."""
    connection = Connection(Standalone(parse_url(valkey_url)), "test", Telemetry())
    await connection.call("PING")
    waiting = [connection.submit(pack(("BLPOP", "nothing", "0")))]
    await asyncio.sleep(0)
    waiting.append(connection.submit(pack(("PING",))))
    await connection.close()
    waiting.append(connection.submit(pack(("PING",))))
    async with asyncio.timeout(5):
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(r) for r in results[:2]] == [ConnectionLost] * 2
    assert isinstance(results[2], BusError)


async def test_closing_in_the_turn_of_the_first_request_answers_it(valkey_url):
    connection = Connection(Standalone(parse_url(valkey_url)), "test", Telemetry())
    waiting = connection.submit(pack(("PING",)))
    await connection.close()
    async with asyncio.timeout(5):
        with pytest.raises(ConnectionLost):
            await waiting
