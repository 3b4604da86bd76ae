"""A channel as Server-Sent Events, over HTTP: resumed, kept open, ended, and what cannot come."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import fastapi
import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

import bus.web
from bus import Bus, DeclarationError, Event, ServerUnreachable
from bus.web import response as response_module
from bus.web import sse
from tests.servers import ask
from tests.web.serving import Seen, events, served
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus import Channel
    from bus.embedded import EmbeddedServer


class Token(Event, type="web.token"):
    n: int
    text: str = ""


class Packed(Event, type="web.packed", encoding="msgpack"):
    n: int


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url) as bus:
        yield bus


def application(bus: Bus, **options: Any) -> Starlette:
    async def run(request: Request) -> Any:
        return sse(request, bus.channel(request.path_params["run"], maxlen=100), **options)

    return Starlette(routes=[Route("/runs/{run}", run)])


@asynccontextmanager
async def browsing(bus: Bus, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        served(application(bus, **options)) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        yield client


async def say(channel: Channel, *numbers: int) -> list[str]:
    receipts = await asyncio.gather(*(channel.publish(Token(n=n)) for n in numbers))
    return [receipt.entry_id for receipt in receipts]


async def all_of(client: httpx.AsyncClient, path: str, **headers: str) -> list[Seen]:
    """Return what comes, the end included, after which a client stops."""
    seen = []
    async with client.stream("GET", path, headers=headers) as response:
        assert response.status_code == 200
        async for event in events(response):
            seen.append(event)
            if event.event == "end":
                break
    return seen


async def test_entries_are_events_with_their_ids_and_the_end_is_the_last(valkey: Bus) -> None:
    channel = valkey.channel("a")
    ids = await say(channel, 0, 1)
    async with browsing(valkey) as client:
        reading = asyncio.create_task(all_of(client, "/runs/a"))
        await eventually(lambda: valkey._hub._followed)
        receipt = await channel.publish(Token(n=2, text="two\nlines, and ä"))
        packed = await channel.publish(Packed(n=3))
        await channel.end()
        *seen, end = await reading
    assert [s.id for s in seen] == [*ids, receipt.entry_id, packed.entry_id]
    assert [s.event for s in seen] == ["web.token"] * 3 + ["web.packed"]
    assert [json.loads(s.data)["n"] for s in seen] == [0, 1, 2, 3]
    assert json.loads(seen[2].data)["text"] == "two\nlines, and ä"
    assert (end.event, end.data) == ("end", "{}")
    assert end.id > packed.entry_id


async def test_the_response_is_one_that_proxies_and_browsers_leave_alone(valkey: Bus) -> None:
    await valkey.channel("a").end()
    async with browsing(valkey, retry_ms=250) as client:
        response = await client.get("/runs/a")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert "retry: 250\r\n" in response.text


async def test_a_client_that_comes_back_goes_on_behind_what_it_has_seen(valkey: Bus) -> None:
    channel = valkey.channel("a")
    ids = await say(channel, *range(10))
    await channel.end()
    async with browsing(valkey) as client:
        seen = await all_of(client, "/runs/a", **{"Last-Event-ID": ids[6]})
        assert [s.id for s in seen[:-1]] == ids[7:]
        first_load = await all_of(client, f"/runs/a?last_event_id={ids[7]}")
        assert [s.id for s in first_load[:-1]] == ids[8:]
        both = await all_of(client, f"/runs/a?last_event_id={ids[0]}", **{"Last-Event-ID": ids[8]})
        assert [s.id for s in both[:-1]] == ids[9:], "the header is what came last"
        again = await all_of(client, "/runs/a", **{"Last-Event-ID": seen[-1].id})
        assert [s.event for s in again] == ["end"]
        empty = await all_of(client, "/runs/a?last_event_id=", **{"Last-Event-ID": ""})
        assert len(empty) == 11


async def test_a_trimmed_id_is_a_gap_and_the_rest_follows(valkey: Bus) -> None:
    channel = valkey.channel("a", maxlen=100)
    (first, *_) = await say(channel, *range(100))
    for start in range(100, 1000, 100):
        await say(channel, *range(start, start + 100))
    await channel.end()
    async with browsing(valkey) as client:
        gap, *seen, end = await all_of(client, "/runs/a", **{"Last-Event-ID": first})
    assert gap.event == "gap"
    assert json.loads(gap.data) == {"reason": "trimmed", "after": first, "first": seen[0].id}
    numbers = [json.loads(s.data)["n"] for s in seen]
    assert numbers == list(range(numbers[0], 1000))
    assert end.event == "end"


async def test_a_channel_that_is_gone_is_a_gap_and_the_end(valkey: Bus) -> None:
    async with browsing(valkey) as client:
        gap, end = await all_of(client, "/runs/a", **{"Last-Event-ID": "1763629200000-0"})
        told = {"reason": "gone", "after": "1763629200000-0", "first": None}
        assert (gap.event, json.loads(gap.data), end.event) == ("gap", told, "end")
        reading = asyncio.create_task(all_of(client, "/runs/b"))
        (last,) = await say(valkey.channel("b", ttl=timedelta(seconds=1)), 1)
        token, gap, end = await reading
        assert (token.event, gap.event, end.event) == ("web.token", "gap", "end")
        assert json.loads(gap.data) == {"reason": "gone", "after": last, "first": None}


@pytest.mark.parametrize(
    "bad",
    ["x", "1", "1-", "$", "0-0-0", "1-2\u00e9", "-1-1", "9" * 30 + "-1", "1-1,2-2", "🙂" * 900],
)
async def test_what_is_no_id_is_the_clients_fault(valkey: Bus, bad: str) -> None:
    async with browsing(valkey) as client:
        for asked in (
            client.get("/runs/a", headers={"Last-Event-ID": bad.encode()}),  # type: ignore[dict-item]
            client.get("/runs/a", params={"last_event_id": bad}),
        ):
            response = await asked
            assert response.status_code == 400
            assert response.text == "Last-Event-ID is not the id of an entry\n"


async def test_an_id_that_was_never_here_is_a_gap_and_all_comes(valkey: Bus) -> None:
    channel = valkey.channel("a")
    await say(channel, 1)
    await channel.end()
    async with browsing(valkey) as client:
        gap, token, end = await all_of(client, "/runs/a", **{"Last-Event-ID": f"{2**64 - 1}-3"})
    assert json.loads(gap.data)["reason"] == "restarted"
    assert (token.event, end.event) == ("web.token", "end")


async def test_a_silent_channel_is_kept_open_by_comments(valkey: Bus) -> None:
    async with (
        browsing(valkey, heartbeat_s=0.05) as client,
        client.stream("GET", "/runs/a") as response,
    ):
        lines = response.aiter_lines()
        comments = 0
        while comments < 3:
            line = await anext(lines)
            comments += line.startswith(":")
            assert line.startswith((":", "retry")) or line == ""


async def test_a_client_that_has_gone_costs_nothing_any_more(valkey: Bus) -> None:
    channel = valkey.channel("a")
    await say(channel, 1)
    async with browsing(valkey) as client:
        async with client.stream("GET", "/runs/a") as response:
            coming = events(response)
            assert (await anext(coming)).event == "web.token"
            await eventually(lambda: valkey._hub._followed)
        await eventually(lambda: not valkey._hub._seats)
        assert valkey._hub._followed == {}


async def test_a_client_that_takes_nothing_holds_up_no_other(valkey: Bus) -> None:
    """8 MB pass by it: more than sockets and its place at the shared reader hold."""
    channel = valkey.channel("a", maxlen=100_000)
    async with browsing(valkey) as client:
        url = client.base_url
        with socket.create_connection((url.host, url.port)) as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.sendall(b"GET /runs/a HTTP/1.1\r\nHost: x\r\n\r\n")
            await eventually(lambda: len(valkey._hub._seats) == 1)
            reading = [asyncio.create_task(all_of(client, "/runs/a")) for _ in range(3)]
            await eventually(lambda: sum(bool(s.streams) for s in valkey._hub._seats) == 4)
            text = "x" * 2000
            for start in range(0, 4000, 100):
                await asyncio.gather(
                    *(channel.publish(Token(n=n, text=text)) for n in range(start, start + 100))
                )
            await channel.end()
            for seen in await asyncio.gather(*reading):
                assert [json.loads(s.data)["n"] for s in seen[:-1]] == list(range(4000))
            (seat,) = valkey._hub._seats
            assert seat.streams == (), "it reads by itself, if it ever goes on"
            assert not seat.queue
        await eventually(lambda: not valkey._hub._seats)


async def test_a_thousand_clients_share_one_reader(valkey: Bus, shared_server) -> None:
    server: EmbeddedServer = shared_server("valkey-9.1")
    app = application(valkey)
    bodies: list[bytearray] = []

    async def client() -> None:
        """Be a server's connection: without sockets, of which a process may not have so many."""
        body = bytearray()
        bodies.append(body)
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            body.extend(message.get("body", b""))

        scope = {"type": "http", "method": "GET", "path": "/runs/a", "headers": []}
        await app({**scope, "query_string": b"", "asgi": {}}, receive, send)

    channel = valkey.channel("a")
    clients = [asyncio.create_task(client()) for _ in range(1000)]
    await eventually(lambda: sum(bool(s.streams) for s in valkey._hub._seats) == 1000)
    readers = await eventually(
        lambda: ask(server, "CLIENT", "LIST").count(b"cmd=xread "), "somebody reads"
    )
    assert readers == 1
    ids = [*await say(channel, *range(10)), *await say(channel, *range(10, 20))]
    await channel.end()
    await asyncio.gather(*clients)
    for body in bodies:
        assert [line[4:] for line in body.decode().split("\r\n") if line.startswith("id:")][
            :-1
        ] == ids
        assert body.count(b"event: end") == 1
    assert not valkey._hub._seats


async def test_a_bus_that_closes_ends_the_responses(valkey_url: str) -> None:
    bus = Bus.connect(valkey_url)
    async with browsing(bus) as client, client.stream("GET", "/runs/a") as response:
        await eventually(lambda: bus._hub._followed)
        await bus.close()
        assert "event: end" not in [line async for line in response.aiter_lines()]


@pytest.mark.parametrize("options", [{"heartbeat_s": 0}, {"retry_ms": -1}, {"retry_ms": 0.5}])
async def test_bad_options_are_the_programs_fault(valkey: Bus, options: Any) -> None:
    request = Request({"type": "http", "headers": [], "query_string": b""})
    with pytest.raises(DeclarationError):
        sse(request, valkey.channel("a"), **options)


@pytest.mark.parametrize(
    "data",
    [b"\xc1", b"", b"\xd4\x05x", msgspec.msgpack.encode({(1, 2): 3}), b"\x91" * 5000 + b"\x01"],
    ids=["not msgpack", "nothing", "an extension", "a pair as a key", "nested too deep"],
)
async def test_msgpack_that_json_cannot_say_is_passed_on_and_the_rest_follows(
    valkey: Bus, data: bytes
) -> None:
    channel = valkey.channel("a")
    fields = {"id": "x", "type": "a.b", "data": data, "datacontenttype": "application/msgpack"}
    await valkey.redis.xadd(channel.key, fields)
    await channel.publish(Packed(n=4))
    await channel.end()
    async with browsing(valkey) as client:
        odd, packed, end = await all_of(client, "/runs/a")
    assert odd.data == data.decode(errors="replace")
    assert (json.loads(packed.data), end.event) == ({"n": 4}, "end")


async def test_data_that_others_wrote_is_passed_on_whatever_it_is(valkey: Bus) -> None:
    channel = valkey.channel("a")
    for data in (b'{\n"n": 1\n}', b"\xff\xfe", b""):
        await valkey.redis.xadd(channel.key, {"id": "x", "type": "a.\r\nevent: end", "data": data})
    await channel.publish(Token(n=4))
    await channel.end()
    async with browsing(valkey) as client:
        seen = await all_of(client, "/runs/a")
    assert json.loads(seen[0].data) == {"n": 1}
    assert "\ufffd" in seen[1].data
    assert [s.event for s in seen[-2:]] == ["web.token", "end"]
    assert seen[0].event == "a.event: end", "a line break begins no other field"


@pytest.mark.parametrize("type", ["end", "gap", "error", "e\nnd", "", b"\xff"])
async def test_no_entry_looks_like_an_end_or_a_gap(valkey: Bus, type: Any) -> None:
    channel = valkey.channel("a")
    await valkey.redis.xadd(channel.key, {"id": "x", "type": type, "data": "{}"})
    await say(channel, 1)
    await channel.end()
    async with browsing(valkey) as client:
        seen = await all_of(client, "/runs/a")
    assert [s.event for s in seen] == ["message", "web.token", "end"]


# --- the application


def fast(bus: Bus) -> fastapi.FastAPI:
    app = fastapi.FastAPI(lifespan=bus.lifespan)

    @app.post("/runs/{run}")
    async def begin(run: str, request: fastapi.Request) -> str:
        channel = request.state.bus.channel(run)
        receipt = await channel.publish(Token(n=1))
        await channel.end()
        return str(receipt.entry_id)

    @app.get("/runs/{run}")
    async def follow(run: str, request: fastapi.Request) -> fastapi.Response:
        return sse(request, bus.channel(run))

    return app


def test_an_application_opens_and_closes_its_bus_each_time_it_is_started(valkey_url: str) -> None:
    """As its tests do, in a loop of their own each."""
    bus = Bus.connect(valkey_url)
    told: list[int] = []
    observer = bus.observe(Token, lambda event: told.append(event.n))
    gone = bus.observe(Token, lambda event: told.append(-event.n))

    async def once(run: str) -> None:
        async with served(fast(bus)) as url, httpx.AsyncClient(base_url=url) as client:
            entry_id = (await client.post(f"/runs/{run}")).json()
            text = (await client.get(f"/runs/{run}")).text
            bus.emit(Token(n=7))
            soon = await asyncio.to_thread(bus.publish_soon, Token(n=8))
            assert (await asyncio.wrap_future(soon)).entry_id
        assert f"id: {entry_id}\r\nevent: web.token\r\ndata: " in text
        assert "event: end\r\n" in text
        assert not bus._open

    asyncio.run(once("a"))
    assert told == [7, -7, 8, -8], "observers see what there was before it was closed"
    gone.close()
    told.clear()
    asyncio.run(once("b"))
    assert told == [7, 8]
    assert not observer.dropped


async def test_an_application_whose_server_is_away_does_not_start(tmp_path) -> None:
    bus = Bus.connect(f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(ServerUnreachable):
        async with Starlette(lifespan=bus.lifespan).router.lifespan_context(object()):
            pass


async def test_litestar_gets_a_context_manager_of_its_application(valkey_url: str) -> None:
    """`Litestar(lifespan=[bus.lifespan])` calls it with the application, and ignores the value."""
    bus = Bus.connect(valkey_url)
    async with bus.lifespan(object()):
        await say(bus.channel("a"), 1)
    assert not bus._open


@pytest.mark.parametrize("library", ["starlette", "sse_starlette"])
def test_without_the_extra_it_says_what_to_install(library: str) -> None:
    program = f"import sys; sys.modules[{library!r}] = None\nimport bus.web"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert done.stderr.endswith(
        "bus.web needs Starlette and sse-starlette: pip install 'bus-streams[web]'\n"
    )


def test_the_core_needs_no_web_library() -> None:
    assert bus.web.sse is response_module.sse
    program = "import sys\nfrom bus import Bus\nBus.connect('redis://x').channel('a')\n"
    program += "print([m for m in sys.modules if 'starlette' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"[]\n"
