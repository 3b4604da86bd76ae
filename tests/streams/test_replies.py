"""What servers answer when they refuse, told by its code, never by its arguments."""

from __future__ import annotations

import re

import pytest

from bus import (
    BusError,
)
from bus.streams.connection import pack
from bus.streams.replies import TRANSIENT, ReplyError
from tests.servers import ask
from tests.streams.wire import CANARY, connected, with_user


async def test_errors_are_known_by_their_code(private_server, server_kind):
    server = private_server(server_kind)
    async with connected(server.url) as connection:

        async def code(*command: str) -> str:
            with pytest.raises(ReplyError) as raised:
                await connection.call(*command)
            return raised.value.code

        await connection.call("SET", "text", "x")
        await connection.call("XGROUP", "CREATE", "stream", "g", "0", "MKSTREAM")
        add = "return redis.call('XADD', KEYS[1], '*', 'a', 'b')"
        assert await code("XADD", "text", "*", "a", "b") == "WRONGTYPE"
        assert await code("EVAL", add, "1", "text") == "WRONGTYPE"
        assert await code("XGROUP", "CREATE", "stream", "g", "0") == "BUSYGROUP"
        assert await code("XREADGROUP", "GROUP", "no", "c", "STREAMS", "stream", ">") == "NOGROUP"
        assert await code("EVALSHA", "0" * 40, "0") == "NOSCRIPT"
        assert await code("NOSUCHCOMMAND") == "ERR"
        await connection.call("CONFIG", "SET", "maxmemory", "1")
        assert await code("XADD", "stream", "*", "a", "b") == "OOM"
        assert await code("EVAL", add, "1", "stream") == "OOM"
        await connection.call("CONFIG", "SET", "maxmemory", "0")
        await connection.call("REPLICAOF", "127.0.0.1", "1")
        assert await code("XADD", "stream", "*", "a", "b") == "READONLY"
        assert await code("EVAL", add, "1", "stream") == "READONLY"
        await connection.call("REPLICAOF", "NO", "ONE")
        ask(server, "ACL", "SETUSER", "half", "on", ">pw", "~*", "+ping", "+eval", "-xadd")
        ask(server, "ACL", "SETUSER", "aside", "on", ">pw", "~other:*", "+@all")
    for user in ("half", "aside"):
        async with connected(with_user(server.url, f"{user}:pw")) as connection:
            assert await code("XADD", "stream", "*", "a", "b") == "NOPERM"
            assert await code("EVAL", add, "1", "stream") == "NOPERM"


@pytest.mark.parametrize("code", ["WRONGTYPE", "NOGROUP", "NOSCRIPT", "NOPERM", "BUSYGROUP", "ERR"])
def test_what_no_waiting_mends_is_not_transient(code):
    assert code not in TRANSIENT


async def test_the_text_of_an_error_that_may_quote_arguments_is_not_shown(url):
    async with connected(url) as connection:
        for command in (("NOSUCH", CANARY), ("SET", "k", "v", CANARY), ("EVAL", CANARY, "0")):
            with pytest.raises(ReplyError) as raised:
                await connection.call(*command)
            assert CANARY not in str(raised.value) + repr(raised.value)
            assert re.fullmatch(r"[A-Z]+", str(raised.value))


async def test_error_replies_among_others_keep_their_places(url):
    async with connected(url) as connection:
        packed = pack(("ECHO", "a")) + pack(("NOSUCH",)) + pack(("ECHO", "b"))
        first, error, last = await connection.submit(packed, 3)
        assert (first, last) == (b"a", b"b")
        assert isinstance(error, ReplyError)
        assert isinstance(error, BusError)
